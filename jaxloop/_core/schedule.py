"""The schedule: how many iterations can run before the next handler, from counters and filters.

    watches = [Watch(Event.ITERATION_COMPLETED, every(50))]
    length = block_length(watches, counts, limit=64)

This file decides how handlers limit the length of a block. It is pure integer arithmetic and uses
no clock, no device and no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxloop._core.events import ITERATION_EVENTS, Event
from jaxloop._core.filters import ALWAYS, Filter
from jaxloop._core.state import Counts


class Watch:
    """A handler's interest in an event.

    A clock does not limit a block, because it is only read where a block ends. Two filters
    therefore represent a timed one: `_sure` is true at any time, and `_possible` at some time.

    Attributes:
        event: The event.
    """

    __slots__ = ("_asks", "_possible", "_sure", "event")

    def __init__(self, event: Event, filter: Filter) -> None:
        self.event, self._asks = event, filter.asks
        self._sure = filter.given_time(False)
        possible = filter.given_time(True) if filter.timed else ALWAYS
        self._possible = None if possible == ALWAYS else possible

    def distance(self, counts: Counts, limit: int, ahead: int = 0) -> int | None:
        """Returns the number of firings until the handler may run, where 1 is the next firing.

        Counting begins ``ahead`` firings after ``counts``.

        Returns:
            A distance up to ``limit``, or None. A function filter may match at any firing.

        Example:
            >>> from jaxloop._core.filters import every
            >>> watch = Watch(Event.ITERATION_COMPLETED, every(10))
            >>> watch.distance({Event.ITERATION_COMPLETED: (7, 7)}, limit=50)
            3
        """
        if self._asks:
            return 1
        total, epoch = counts[self.event]
        found = self._sure.next_match(total + ahead, epoch + ahead, limit)
        if self._possible is not None:
            perhaps = self._possible.next_match(total + ahead, epoch + ahead, limit)
            found = min((one for one in (found, perhaps) if one is not None), default=None)
        return found


def block_length(watches: Iterable[Watch], counts: Counts, limit: int, ahead: int = 0) -> int:
    """Returns how many iterations can run before a handler must, from 1 to ``limit``.

    The engine calls this between the firing of ``iteration_started`` and the step, so the handlers
    of that firing have already run. A handler on ``iteration_started`` that is ``d`` firings away
    leaves room for ``d`` steps, and so does one on ``iteration_completed``.

    Args:
        watches: The watches of the handlers. Only those on iteration events count.
        counts: The firings so far, including the start of the next iteration but not its end.
        limit: The maximum number of iterations.
        ahead: How many iterations after ``counts`` the block begins.

    Example:
        >>> from jaxloop._core.filters import every, only
        >>> counts = {Event.ITERATION_STARTED: (1, 1), Event.ITERATION_COMPLETED: (0, 0)}
        >>> block_length([Watch(Event.ITERATION_STARTED, only(4))], counts, limit=50)
        3
        >>> block_length([Watch(Event.ITERATION_COMPLETED, every(4))], counts, limit=50)
        4
    """
    length = limit
    for watch in watches:
        if watch.event in ITERATION_EVENTS:
            found = watch.distance(counts, length, ahead)
            if found is not None and found < length:
                length = found
    return max(1, length)


def superbatch_length(watches: Sequence[Watch], counts: Counts, offset: int, capacity: int) -> int:
    """Returns how many batches to stack, so that few blocks are cut short by a superbatch's end.

    If handlers run often, blocks are short anyway, and a full superbatch serves many of them. If
    about one to four blocks fit, the superbatch ends with the last block that fits.

    Args:
        watches: See `block_length`.
        counts: See `block_length`.
        offset: How many iterations from now the superbatch begins.
        capacity: The maximum number of batches that it may hold.

    Example:
        >>> from jaxloop._core.filters import every
        >>> counts = {Event.ITERATION_STARTED: (1, 1), Event.ITERATION_COMPLETED: (0, 0)}
        >>> watches = [Watch(Event.ITERATION_COMPLETED, every(25))]
        >>> superbatch_length(watches, counts, offset=0, capacity=64)
        50
    """
    length = 0
    while True:
        more = block_length(watches, counts, capacity + 1, offset + length)
        if length + more > capacity:
            return length or capacity
        if more * _SHORT_BLOCKS <= capacity:
            return capacity
        length += more
        if length == capacity:
            return length


_SHORT_BLOCKS = 4
"""If at least this many blocks fit, it does not matter where the superbatch ends."""


def matches(filter: Filter, total: int, epoch: int, limit: int) -> Iterable[int]:
    """Returns the distances, from 1 to ``limit``, of the firings at which the filter may be true.

    Example:
        >>> from jaxloop._core.filters import every
        >>> list(matches(every(10), total=7, epoch=7, limit=20))
        [3, 13]
    """
    if filter == ALWAYS or filter.asks:
        return range(1, limit + 1)
    found: list[int] = []
    done = 0
    while (distance := filter.next_match(total + done, epoch + done, limit - done)) is not None:
        done += distance
        found.append(done)
    return found
