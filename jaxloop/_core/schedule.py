"""The schedule: from counters and filters, how many iterations run before a handler must."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxloop._core import filters
from jaxloop._core.events import Event
from jaxloop._core.filters import (
    ALWAYS,
    Filter,
    Firing,
    _All,
    _Any,
    _Constant,
    _Count,
    _Not,
    _Seconds,
    asks,
)


def given_time(filter: Filter, value: bool) -> Filter:
    """``filter`` with every clock in it replaced by ``value``, simplified.

    Example:
        >>> given_time(every(5) & every_seconds(1), True)
        every(5)
        >>> given_time(every(5) | every_seconds(1), True)
        always
    """
    if isinstance(filter, _Seconds):
        return _Constant(value)
    if isinstance(filter, _Not):
        inner = given_time(filter.inner, value)
        return _Constant(not inner.value) if isinstance(inner, _Constant) else _Not(inner)
    if isinstance(filter, _All | _Any):
        left, right = given_time(filter.left, value), given_time(filter.right, value)
        absorbing = _Constant(isinstance(filter, _Any))
        if absorbing in (left, right):
            return absorbing
        if isinstance(left, _Constant):
            return right
        if isinstance(right, _Constant):
            return left
        return type(filter)(left, right)
    return filter


def matches(filter: Filter, total: int, epoch: int, limit: int) -> Iterable[int]:
    """Which of the next ``limit`` firings the filter may be true for, as distances from 1.

    Example:
        >>> list(matches(every(10), total=7, epoch=7, limit=20))
        [3, 13]
    """
    if filter == ALWAYS or asks(filter):
        return range(1, limit + 1)
    found, done = [], 0
    while (distance := next_match(filter, total + done, epoch + done, limit - done)) is not None:
        done += distance
        found.append(done)
    return found


def next_match(filter: Filter, total: int, epoch: int, limit: int) -> int | None:
    """How many firings from now the filter, made of counts alone, is true for the first time.

    Args:
        filter: A filter without a clock or a callable.
        total: Firings so far, over the life of the state.
        epoch: Firings so far in this epoch.
        limit: How far to look.

    Returns:
        A distance from 1 to ``limit``, or None if there is none that near.

    Example:
        >>> next_match(every(10), total=7, epoch=7, limit=100)
        3
    """
    if isinstance(filter, _Constant):
        return 1 if filter.value and limit >= 1 else None
    if isinstance(filter, _Count):
        count = total if filter.per is None else epoch
        if filter.kind == "every":
            distance = filter.n - count % filter.n
        elif filter.kind == "only":
            distance = filter.n - count
        elif filter.kind == "after":
            distance = max(1, filter.n + 1 - count)
        else:
            distance = 1 if count + 1 < filter.n else 0
        return distance if 1 <= distance <= limit else None
    if isinstance(filter, _Any):
        near = [next_match(part, total, epoch, limit) for part in (filter.left, filter.right)]
        return min((one for one in near if one is not None), default=None)
    if isinstance(filter, _All):
        # Leapfrog: each side names its next candidate until both agree.
        done = 0
        while done < limit:
            steps = [
                next_match(part, total + done, epoch + done, limit - done)
                for part in (filter.left, filter.right)
            ]
            if steps[0] is None or steps[1] is None:
                return None
            if steps[0] == steps[1]:
                return done + steps[0]
            done += max(steps[0], steps[1]) - 1
        return None
    for distance in range(1, limit + 1):
        if filter.matches(Firing(total + distance, epoch + distance)):
            return distance
    return None


Counts = Mapping[Event, tuple[int, int]]


class Watch(NamedTuple):
    """A handler's interest in an event."""

    event: Event
    filter: Filter


def distance(watch: Watch, counts: Counts, limit: int) -> int | None:
    """How many firings of its event from now a watch may run: 1 is the next; None: not in reach.

    A filter that asks a function may run at any firing. A clock alone bounds nothing: it is asked
    wherever a block happens to end.

    Example:
        >>> watch = Watch(Event.ITERATION_COMPLETED, filters.every(10))
        >>> distance(watch, {Event.ITERATION_COMPLETED: (7, 7)}, limit=50)
        3
    """
    if filters.asks(watch.filter):
        return 1
    total, epoch = counts[watch.event]
    if not filters.timed(watch.filter):
        return next_match(watch.filter, total, epoch, limit)
    found = next_match(given_time(watch.filter, False), total, epoch, limit)
    possible = given_time(watch.filter, True)
    if possible != filters.ALWAYS:
        perhaps = next_match(possible, total, epoch, limit)
        found = min((one for one in (found, perhaps) if one is not None), default=None)
    return found


def block_length(watches: Iterable[Watch], counts: Counts, limit: int) -> int:
    """The number of iterations that run before a handler must, from 1 to ``limit``.

    Whatever fires at the next ``iteration_started`` has run already: this is asked between that
    firing and the step. So an ``iteration_started`` ``d`` firings away leaves room for ``d`` steps,
    as does an ``iteration_completed``.

    Args:
        watches: The handlers' interests; events other than an iteration's are passed over.
        counts: Firings so far: the coming iteration's start is counted, its completion is not.
        limit: The most iterations that may run.

    Example:
        >>> counts = {Event.ITERATION_STARTED: (1, 1), Event.ITERATION_COMPLETED: (0, 0)}
        >>> block_length([Watch(Event.ITERATION_STARTED, filters.only(4))], counts, limit=50)
        3
        >>> block_length([Watch(Event.ITERATION_COMPLETED, filters.every(4))], counts, limit=50)
        4
    """
    length = limit
    for watch in watches:
        if watch.event in (Event.ITERATION_STARTED, Event.ITERATION_COMPLETED):
            found = distance(watch, counts, length)
            if found is not None:
                length = min(length, found)
    return max(1, length)


def stack_length(watches: Sequence[Watch], counts: Counts, offset: int, capacity: int) -> int:
    """How many batches to stack, so that few blocks end because a stack does.

    Where handlers run often, blocks are short whatever happens, and a full stack serves many. Where
    about one to four blocks fit, the stack ends with the last that does.

    Args:
        watches: As for `block_length`.
        counts: As for `block_length`.
        offset: How many iterations from now the stack begins.
        capacity: The most batches that it may hold.

    Example:
        >>> counts = {Event.ITERATION_STARTED: (1, 1), Event.ITERATION_COMPLETED: (0, 0)}
        >>> watches = [Watch(Event.ITERATION_COMPLETED, filters.every(25))]
        >>> stack_length(watches, counts, offset=0, capacity=64)
        50
    """
    length = 0
    while True:
        later = {
            event: (t + offset + length, e + offset + length) for event, (t, e) in counts.items()
        }
        more = block_length(watches, later, capacity + 1)
        if length + more > capacity:
            return length or capacity
        if more * SHORT_BLOCKS <= capacity:
            return capacity
        length += more


SHORT_BLOCKS = 4
"""So many blocks a stack, and it does not matter where it ends."""
