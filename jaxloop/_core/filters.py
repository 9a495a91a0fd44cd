"""Filters: at which firings of its event a handler runs.

    every(10) & after(100)        # 110, 120, ...
    ~only(3, per="epoch")         # all but the third of each epoch

A filter is a frozen value over two counts, the firing's number since the start and within the
epoch, both from 1. It keeps no state; so the driver can ask when it will be true next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxloop.errors import ArgumentError, ArgumentTypeError, unknown_name


class Firing(NamedTuple):
    """What a filter may look at.

    Attributes:
        total: The firing's number over the life of the state, from 1.
        epoch: The firing's number within the epoch, from 1.
        elapsed_s: Seconds since the attachment last ran, or since the run began.
        view: What a callable filter is given: a `State`, for an observer a `Snapshot`.
    """

    total: int
    epoch: int
    elapsed_s: float = 0.0
    view: Callable[[], Any] = lambda: None


@dataclasses.dataclass(frozen=True)
class Filter:
    """The base of all filters: ``matches(firing)``, and ``&``, ``|``, ``~``.

    Example:
        >>> (every(2) & after(3)).matches(Firing(total=4, epoch=4))
        True
    """

    def matches(self, firing: Firing) -> bool:
        """Whether the attachment runs at this firing."""
        raise TypeError(f"{type(self).__name__} must define matches")

    def __and__(self, other: object) -> Filter:
        return _All(self, as_filter(other))

    def __rand__(self, other: object) -> Filter:
        return _All(as_filter(other), self)

    def __or__(self, other: object) -> Filter:
        return _Any(self, as_filter(other))

    def __ror__(self, other: object) -> Filter:
        return _Any(as_filter(other), self)

    def __invert__(self) -> Filter:
        return _Not(self)


@dataclasses.dataclass(frozen=True, repr=False)
class _Constant(Filter):
    value: bool

    def matches(self, firing: Firing) -> bool:
        return self.value

    def __repr__(self) -> str:
        return "always" if self.value else "never"


ALWAYS = _Constant(True)


_TESTS: dict[str, Callable[[int, int], bool]] = {
    "every": lambda count, n: count % n == 0,
    "only": lambda count, n: count == n,
    "after": lambda count, n: count > n,
    "before": lambda count, n: count < n,
}


@dataclasses.dataclass(frozen=True, repr=False)
class _Count(Filter):
    kind: str
    n: int
    per: str | None = None

    def matches(self, firing: Firing) -> bool:
        return _TESTS[self.kind](firing.total if self.per is None else firing.epoch, self.n)

    def __repr__(self) -> str:
        if self == once:
            return "once"
        return f"{self.kind}({self.n}{'' if self.per is None else ', per=' + repr(self.per)})"


@dataclasses.dataclass(frozen=True, repr=False)
class _Seconds(Filter):
    seconds: float

    def matches(self, firing: Firing) -> bool:
        return firing.elapsed_s >= self.seconds

    def __repr__(self) -> str:
        return f"every_seconds({self.seconds:g})"


@dataclasses.dataclass(frozen=True, repr=False)
class _Asked(Filter):
    fn: Callable[[Any], bool]

    def matches(self, firing: Firing) -> bool:
        return bool(self.fn(firing.view()))

    def __repr__(self) -> str:
        return getattr(self.fn, "__name__", "callable")


@dataclasses.dataclass(frozen=True, repr=False)
class _All(Filter):
    left: Filter
    right: Filter

    def matches(self, firing: Firing) -> bool:
        return self.left.matches(firing) and self.right.matches(firing)

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


@dataclasses.dataclass(frozen=True, repr=False)
class _Any(Filter):
    left: Filter
    right: Filter

    def matches(self, firing: Firing) -> bool:
        return self.left.matches(firing) or self.right.matches(firing)

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


@dataclasses.dataclass(frozen=True, repr=False)
class _Not(Filter):
    inner: Filter

    def matches(self, firing: Firing) -> bool:
        return not self.inner.matches(firing)

    def __repr__(self) -> str:
        return f"~{self.inner!r}"


def _count(kind: str, n: int, per: str | None) -> Filter:
    if isinstance(n, bool) or not isinstance(n, int):
        raise ArgumentTypeError(
            f"filter {kind}(n) needs a whole number, and n is {n!r}", fix=f"for example {kind}(10)"
        )
    if n < 1:
        raise ArgumentError(
            f"filter {kind}({n}): n must be at least 1, as firings count from 1",
            fix=f"for example {kind}(1)",
        )
    if per not in (None, "epoch"):
        raise unknown_name("per of a filter", per, ["epoch"])
    return _Count(kind, n, per)


def every(n: int, *, per: str | None = None) -> Filter:
    """Fires at n, 2n, 3n, ...

    Args:
        n: A whole number of firings, at least 1.
        per: None counts over the life of the state, "epoch" within the epoch.

    Raises:
        ArgumentError: ``n`` is below 1, or ``per`` is unknown.
        ArgumentTypeError: ``n`` is not an int.

    Example:
        >>> every(10, per="epoch")
        every(10, per='epoch')
    """
    return _count("every", n, per)


def only(n: int, *, per: str | None = None) -> Filter:
    """Fires at the n-th firing alone; arguments as for `every`.

    Example:
        >>> only(3).matches(Firing(total=3, epoch=1))
        True
    """
    return _count("only", n, per)


def after(n: int, *, per: str | None = None) -> Filter:
    """Fires at every firing later than the n-th; arguments as for `every`.

    Example:
        >>> after(3).matches(Firing(total=3, epoch=1))
        False
    """
    return _count("after", n, per)


def before(n: int, *, per: str | None = None) -> Filter:
    """Fires at every firing earlier than the n-th; arguments as for `every`.

    Example:
        >>> before(3).matches(Firing(total=2, epoch=1))
        True
    """
    return _count("before", n, per)


once: Filter = _Count("only", 1)
"""The filter "once": the first firing alone."""


def every_seconds(seconds: float) -> Filter:
    """Fires when ``seconds`` have passed since it last did (at first: since the run began).

    It is asked at the boundaries of blocks, which come at least about once a second. A handler
    under it that changes the state gives up exact repetition, for a clock decides.

    Args:
        seconds: Seconds, above 0.

    Raises:
        ArgumentError: ``seconds`` is not a positive number.

    Example:
        >>> every_seconds(30)
        every_seconds(30)
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise ArgumentError(
            f"every_seconds needs a positive number of seconds, and got {seconds!r}",
            fix="for example every_seconds(30)",
        )
    return _Seconds(float(seconds))


_FACTORIES: dict[str, Callable[[Any], Filter]] = {
    "every": every,
    "only": only,
    "after": after,
    "before": before,
    "every_seconds": every_seconds,
}


def as_filter(value: object) -> Filter:
    """The filter that ``value`` means: a filter, "always", "once", a dict, or a callable.

    Raises:
        UnknownNameError: A name that is no filter's.
        ArgumentTypeError: Not something that can be a filter.

    Example:
        >>> as_filter({"every": 2, "after": 10})
        (every(2) & after(10))
    """
    if isinstance(value, Filter):
        return value
    if isinstance(value, str):
        if value not in ("always", "once"):
            raise unknown_name("filter", value, ["always", "once", *_FACTORIES])
        return ALWAYS if value == "always" else once
    if isinstance(value, Mapping):
        parts = dict(value)
        per = parts.pop("per", None)
        result: Filter | None = None
        for name, argument in parts.items():
            if name == "once":
                part = once
            elif name in ("every", "only", "after", "before"):
                part = _count(name, argument, per)
            elif name in _FACTORIES:
                part = _FACTORIES[name](argument)
            else:
                raise unknown_name("filter", name, [*_FACTORIES, "once", "per"])
            result = part if result is None else result & part
        if result is not None:
            return result
    elif callable(value):
        return _Asked(value)
    raise ArgumentTypeError(
        f"a filter cannot be made of {value!r}",
        fix="use 'always', 'once', jl.every(n), a dict such as {'every': 10}, or a function",
    )


def asks(filter: Filter) -> bool:
    """Whether a function of the user's decides, so that every firing has to be asked."""
    return isinstance(filter, _Asked) or any(asks(part) for part in _parts(filter))


def timed(filter: Filter) -> bool:
    """Whether a clock has a say."""
    return isinstance(filter, _Seconds) or any(timed(part) for part in _parts(filter))


def _parts(filter: Filter) -> tuple[Filter, ...]:
    if isinstance(filter, _All | _Any):
        return (filter.left, filter.right)
    return (filter.inner,) if isinstance(filter, _Not) else ()
