"""Values that are computed when they are first read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax


class ReadOnlyDict(dict[Any, Any]):
    """A dict that says how to make a changed one, instead of losing the change."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(
            "a State's dicts are read-only, as the State is a value\n"
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


class Lazy:
    """A dict that is computed when it is first asked for, and once."""

    __slots__ = ("_make", "_value")

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make: Callable[[], Mapping[str, Any]] | None = make
        self._value: ReadOnlyDict = ReadOnlyDict()

    def get(self) -> ReadOnlyDict:
        """The dict."""
        if self._make is not None:
            self._value = ReadOnlyDict(self._make())
            self._make = None
        return self._value


class Known:
    """A value that is known already, where one that is not could be."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    def get(self) -> Any:
        """The value."""
        return self._value


class Records:
    """``{epoch: value}``, whose values need not be known before somebody reads them.

    Args:
        items: ``{epoch: item}``; ``item.get()`` gives the value, and may wait for the device.
    """

    __slots__ = ("_items", "_value")

    def __init__(self, items: Mapping[int, Any] | None = None) -> None:
        self._items = items or {}
        self._value: ReadOnlyDict | None = None

    @classmethod
    def known(cls, values: Mapping[int, Any]) -> Records:
        """Records of values that are there."""
        return cls({epoch: Known(value) for epoch, value in values.items()})

    def added(self, epoch: int, item: Any) -> Records:
        """Records with one more."""
        return Records({**self._items, epoch: item})

    def __contains__(self, epoch: int) -> bool:
        return epoch in self._items

    def get(self) -> ReadOnlyDict:
        """All of them, known now."""
        if self._value is None:
            self._value = ReadOnlyDict({e: item.get() for e, item in self._items.items()})
        return self._value
