"""Filters, which select the firings at which a handler runs.

    every(10) & after(100)        # 110, 120, ...
    ~only(3, per="epoch")         # all but the third of each epoch

A filter is a frozen value that reads two counts, both from 1: the number of the firing since the
start, and within the epoch. It keeps no state, so the engine can compute when it is next true.

This file is long because the kinds of filters, their constructors and their parsing are one idea.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from jaxloop.errors import ArgumentError, ArgumentTypeError, unknown_name

Per: TypeAlias = Literal["epoch"] | None
"""Whether a filter counts within the epoch, or over the lifetime of the state."""


class Firing(NamedTuple):
    """The information that a filter can read.

    Attributes:
        total: The number of the firing over the lifetime of the state, from 1.
        epoch: The number of the firing within the epoch, from 1.
        elapsed_s: Seconds since the handler last ran, or since the run began.
        view: Returns the argument of a function filter: a `State`, or a `Snapshot` for observers.
    """

    total: int
    epoch: int
    elapsed_s: float = 0.0
    view: Callable[[], Any] = lambda: None


@dataclasses.dataclass(frozen=True)
class Filter:
    """The base of all filters, with ``matches(firing)`` and the operators ``&``, ``|``, ``~``.

    Example:
        >>> (every(2) & after(3)).matches(Firing(total=4, epoch=4))
        True
    """

    def matches(self, firing: Firing) -> bool:
        """Returns whether the handler runs at this firing."""
        raise TypeError(f"{type(self).__name__} must define matches")

    def next_match(self, total: int, epoch: int, limit: int) -> int | None:
        """Returns the number of firings until the filter is next true.

        Only defined for filters made of counts, without a clock or a function.

        Args:
            total: Firings so far, over the lifetime of the state.
            epoch: Firings so far in this epoch.
            limit: How many firings to look ahead.

        Returns:
            A distance from 1 to ``limit``, or None if the filter is false until then.

        Example:
            >>> every(10).next_match(total=7, epoch=7, limit=100)
            3
        """
        for distance in range(1, limit + 1):
            if self.matches(Firing(total + distance, epoch + distance)):
                return distance
        return None

    def given_time(self, value: bool) -> Filter:
        """Returns the filter with every clock in it replaced by ``value``, simplified.

        Example:
            >>> (every(5) & every_seconds(1)).given_time(True)
            every(5)
            >>> (every(5) | every_seconds(1)).given_time(True)
            always
        """
        del value
        return self

    @property
    def asks(self) -> bool:
        """Whether the filter calls a user's function, which must run at every firing."""
        return False

    @property
    def timed(self) -> bool:
        """Whether the filter depends on a clock."""
        return False

    def __and__(self, other: FilterLike) -> Filter:
        return _All(self, as_filter(other))

    def __rand__(self, other: FilterLike) -> Filter:
        return _All(as_filter(other), self)

    def __or__(self, other: FilterLike) -> Filter:
        return _Any(self, as_filter(other))

    def __ror__(self, other: FilterLike) -> Filter:
        return _Any(as_filter(other), self)

    def __invert__(self) -> Filter:
        return _Not(self)


FilterLike: TypeAlias = (
    Filter | Literal["always", "once"] | Mapping[str, Any] | Callable[[Any], bool]
)
"""A filter, "always", "once", a dict such as ``{"every": 10}``, or a function."""


@dataclasses.dataclass(frozen=True, repr=False)
class _Constant(Filter):
    value: bool

    def matches(self, firing: Firing) -> bool:
        return self.value

    def next_match(self, total: int, epoch: int, limit: int) -> int | None:
        return 1 if self.value and limit >= 1 else None

    def __repr__(self) -> str:
        return "always" if self.value else "never"


ALWAYS: Filter = _Constant(True)


@dataclasses.dataclass(frozen=True, repr=False)
class _Count(Filter):
    """A filter of one count. `_distance` returns the distance to the next match, or 0 for never."""

    n: int
    per: Per = None

    def _distance(self, count: int) -> int:
        raise TypeError(f"{type(self).__name__} must define _distance")

    def matches(self, firing: Firing) -> bool:
        return self._distance((firing.total if self.per is None else firing.epoch) - 1) == 1

    def next_match(self, total: int, epoch: int, limit: int) -> int | None:
        distance = self._distance(total if self.per is None else epoch)
        return distance if 1 <= distance <= limit else None

    def __repr__(self) -> str:
        if self == once:
            return "once"
        name = type(self).__name__.removeprefix("_").lower()
        return f"{name}({self.n}{'' if self.per is None else ', per=' + repr(self.per)})"


class _Every(_Count):
    """True at every n-th firing."""

    def _distance(self, count: int) -> int:
        return self.n - count % self.n


class _Only(_Count):
    """True at the n-th firing only."""

    def _distance(self, count: int) -> int:
        return self.n - count


class _After(_Count):
    """True after the n-th firing."""

    def _distance(self, count: int) -> int:
        return max(1, self.n + 1 - count)


class _Before(_Count):
    """True before the n-th firing."""

    def _distance(self, count: int) -> int:
        return 1 if count + 1 < self.n else 0


@dataclasses.dataclass(frozen=True, repr=False)
class _Seconds(Filter):
    seconds: float

    def matches(self, firing: Firing) -> bool:
        return firing.elapsed_s >= self.seconds

    def given_time(self, value: bool) -> Filter:
        return _Constant(value)

    @property
    def timed(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"every_seconds({self.seconds:g})"


@dataclasses.dataclass(frozen=True, repr=False)
class _Function(Filter):
    fn: Callable[[Any], bool]

    def matches(self, firing: Firing) -> bool:
        return bool(self.fn(firing.view()))

    @property
    def asks(self) -> bool:
        return True

    def __repr__(self) -> str:
        return getattr(self.fn, "__name__", "callable")


@dataclasses.dataclass(frozen=True, repr=False)
class _Pair(Filter):
    """Two filters, combined with "and" or "or"."""

    left: Filter
    right: Filter

    def given_time(self, value: bool) -> Filter:
        left, right = self.left.given_time(value), self.right.given_time(value)
        decisive = _Constant(isinstance(self, _Any))
        if decisive in (left, right):
            return decisive
        if isinstance(left, _Constant):
            return right
        return left if isinstance(right, _Constant) else type(self)(left, right)

    @property
    def asks(self) -> bool:
        return self.left.asks or self.right.asks

    @property
    def timed(self) -> bool:
        return self.left.timed or self.right.timed

    def __repr__(self) -> str:
        return f"({self.left!r} {'|' if isinstance(self, _Any) else '&'} {self.right!r})"


class _All(_Pair):
    def matches(self, firing: Firing) -> bool:
        return self.left.matches(firing) and self.right.matches(firing)

    def next_match(self, total: int, epoch: int, limit: int) -> int | None:
        # Each side names its next match, and the nearer one catches up, until both agree.
        done = 0
        while done < limit:
            left = self.left.next_match(total + done, epoch + done, limit - done)
            right = self.right.next_match(total + done, epoch + done, limit - done)
            if left is None or right is None:
                return None
            if left == right:
                return done + left
            done += max(left, right) - 1
        return None


class _Any(_Pair):
    def matches(self, firing: Firing) -> bool:
        return self.left.matches(firing) or self.right.matches(firing)

    def next_match(self, total: int, epoch: int, limit: int) -> int | None:
        near = [part.next_match(total, epoch, limit) for part in (self.left, self.right)]
        return min((one for one in near if one is not None), default=None)


@dataclasses.dataclass(frozen=True, repr=False)
class _Not(Filter):
    inner: Filter

    def matches(self, firing: Firing) -> bool:
        return not self.inner.matches(firing)

    def given_time(self, value: bool) -> Filter:
        inner = self.inner.given_time(value)
        return _Constant(not inner.value) if isinstance(inner, _Constant) else _Not(inner)

    @property
    def asks(self) -> bool:
        return self.inner.asks

    @property
    def timed(self) -> bool:
        return self.inner.timed

    def __repr__(self) -> str:
        return f"~{self.inner!r}"


_COUNTS: dict[str, type[_Count]] = {
    "every": _Every,
    "only": _Only,
    "after": _After,
    "before": _Before,
}


def _count(name: str, n: object, per: object) -> Filter:
    if isinstance(n, bool) or not isinstance(n, int):
        raise ArgumentTypeError(
            f"filter {name}(n): n must be a whole number, got {n!r}",
            fix=f"pass a whole number, for example {name}(10)",
        )
    if n < 1:
        raise ArgumentError(
            f"filter {name}(n): n must be at least 1, because firings count from 1, got {n}",
            fix=f"pass a whole number from 1 on, for example {name}(1)",
        )
    if per is not None and per != "epoch":
        raise unknown_name("per of a filter", per, ["epoch"])
    return _COUNTS[name](n, "epoch" if per == "epoch" else None)


def every(n: int, *, per: Per = None) -> Filter:
    """Returns a filter that is true at firings n, 2n, 3n, and so on.

    Args:
        n: A whole number of firings, at least 1.
        per: None counts over the lifetime of the state, "epoch" within the epoch.

    Raises:
        ArgumentError: ``n`` is below 1, or ``per`` is unknown.
        ArgumentTypeError: ``n`` is not an int.

    Example:
        >>> every(10, per="epoch")
        every(10, per='epoch')
    """
    return _count("every", n, per)


def only(n: int, *, per: Per = None) -> Filter:
    """Returns a filter that is true at the n-th firing only. The arguments are those of `every`.

    Example:
        >>> only(3).matches(Firing(total=3, epoch=1))
        True
    """
    return _count("only", n, per)


def after(n: int, *, per: Per = None) -> Filter:
    """Returns a filter that is true at every firing later than the n-th. Arguments as in `every`.

    Example:
        >>> after(3).matches(Firing(total=3, epoch=1))
        False
    """
    return _count("after", n, per)


def before(n: int, *, per: Per = None) -> Filter:
    """Returns a filter that is true at every firing before the n-th. Arguments as in `every`.

    Example:
        >>> before(3).matches(Firing(total=2, epoch=1))
        True
    """
    return _count("before", n, per)


once: Filter = _Only(1)
"""The filter "once", which is true at the first firing only."""


def every_seconds(seconds: float) -> Filter:
    """Returns a filter that is true once ``seconds`` have passed since the handler last ran.

    The first interval begins with the run. The engine evaluates the filter between blocks, at least
    about once a second. If a handler with this filter changes the state, the run cannot be repeated
    exactly, because a clock decides when the handler runs.

    Args:
        seconds: The interval, above 0.

    Raises:
        ArgumentError: ``seconds`` is not a positive number.

    Example:
        >>> every_seconds(30)
        every_seconds(30)
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise ArgumentError(
            f"every_seconds: seconds must be a positive number, got {seconds!r}",
            fix="pass a number of seconds, for example every_seconds(30)",
        )
    return _Seconds(float(seconds))


def as_filter(value: FilterLike) -> Filter:
    """Converts a filter, "always", "once", a dict, or a function to a filter.

    Raises:
        UnknownNameError: A name is not the name of a filter.
        ArgumentTypeError: ``value`` cannot be a filter.

    Example:
        >>> as_filter({"every": 2, "after": 10})
        (every(2) & after(10))
    """
    names = [*_COUNTS, "every_seconds"]
    if isinstance(value, Filter):
        return value
    if isinstance(value, str):
        if value not in ("always", "once"):
            raise unknown_name("filter", value, ["always", "once", *names])
        return ALWAYS if value == "always" else once
    if isinstance(value, Mapping):
        parts = dict(value)
        per = parts.pop("per", None)
        result: Filter | None = None
        for name, argument in parts.items():
            if name in _COUNTS:
                part = _count(name, argument, per)
            elif name == "every_seconds":
                part = every_seconds(argument)
            elif name == "once":
                part = once
            else:
                raise unknown_name("filter", name, [*names, "once", "per"])
            result = part if result is None else result & part
        if result is not None:
            return result
    elif callable(value):
        return _Function(value)
    raise ArgumentTypeError(
        f"filter must be a filter object, a name, a dict or a function, got {value!r}",
        fix="pass 'always', 'once', jl.every(n), a dict such as {'every': 10}, or a function",
    )
