"""The plan: from counters and filters, how many iterations run before a handler must.

    length = block_length(watches, counts, limit=50)

Pure integers. No clock, no device, no file is known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxloop import filters
from jaxloop.events import Event
from jaxloop.filters import Filter

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
        return filters.next_match(watch.filter, total, epoch, limit)
    found = filters.next_match(filters.given_time(watch.filter, False), total, epoch, limit)
    possible = filters.given_time(watch.filter, True)
    if possible != filters.ALWAYS:
        perhaps = filters.next_match(possible, total, epoch, limit)
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
