"""Values that are computed when they are first read.

    metrics = LazyDict(lambda: fetch())        # nothing is fetched yet
    metrics.get()["loss"]                      # fetched here, once
    history = EpochRecords().added(0, metrics)
    history.get()[0]["loss"]

A value that is never read is never computed, fetched or copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import jax

ValueT = TypeVar("ValueT")
ValueT_co = TypeVar("ValueT_co", covariant=True)


class ReadOnlyDict(dict[Any, Any]):
    """A dict that refuses changes and says how to make a changed copy."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(
            "the dicts of a State are read-only, because a State is immutable\n"
            "  fix: return state.replace(metrics={**state.metrics, 'name': value}) from a handler"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    pop = popitem = clear = update = setdefault = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (dict(self),))


jax.tree_util.register_pytree_with_keys(
    ReadOnlyDict,
    lambda d: ([(jax.tree_util.DictKey(k), d[k]) for k in sorted(d)], tuple(sorted(d))),
    lambda keys, values: ReadOnlyDict(zip(keys, values, strict=True)),
)


class Readable(Protocol[ValueT_co]):
    """An object whose ``get`` returns a value. It may wait for the device."""

    def get(self) -> ValueT_co:
        """Returns the value."""


class Constant(Generic[ValueT]):
    """A value that is already known, with the interface of `Readable`."""

    __slots__ = ("_value",)

    def __init__(self, value: ValueT) -> None:
        self._value = value

    def get(self) -> ValueT:
        """Returns the value."""
        return self._value


class LazyDict:
    """A dict that is computed once, when it is first read."""

    __slots__ = ("_make", "_value")

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make: Callable[[], Mapping[str, Any]] | None = make
        self._value: ReadOnlyDict = ReadOnlyDict()

    def get(self) -> ReadOnlyDict:
        """Returns the dict."""
        if self._make is not None:
            self._value = ReadOnlyDict(self._make())
            self._make = None
        return self._value

    def adding(self, values: Mapping[str, Any]) -> LazyDict:
        """Returns a dict with more values, without computing this one."""
        return LazyDict(lambda: {**self.get(), **values})


class EpochRecords:
    """A mapping ``{epoch: value}`` whose values are read on demand.

    Args:
        items: ``{epoch: item}``. ``item.get()`` returns the value, and may wait for the device.
    """

    __slots__ = ("_items", "_value")

    def __init__(self, items: Mapping[int, Readable[Any]] | None = None) -> None:
        self._items = items or {}
        self._value: ReadOnlyDict | None = None

    @classmethod
    def of(cls, values: Mapping[int, Any]) -> EpochRecords:
        """Returns records of values that are already known."""
        return cls({epoch: Constant(value) for epoch, value in values.items()})

    def added(self, epoch: int, item: Readable[Any]) -> EpochRecords:
        """Returns records with one more epoch."""
        return EpochRecords({**self._items, epoch: item})

    def __contains__(self, epoch: int) -> bool:
        return epoch in self._items

    def get(self) -> ReadOnlyDict:
        """Reads every value and returns all of them."""
        if self._value is None:
            self._value = ReadOnlyDict({e: item.get() for e, item in self._items.items()})
        return self._value
