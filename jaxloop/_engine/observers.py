"""Observers, and the metrics that they look at: nothing is computed until somebody asks.

    rows = Rows(program, out.ring, number)
    watching.notice_block(fields, 64, rows, extra={})
    ...                                     # the next block is dispatched
    for observer, snapshot in due(watching.take()):
        observer.fn(snapshot)               # while the device works

What an observer will see is fixed when its event fires; when it runs is the driver's affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxloop._core import filters
from jaxloop._core.events import Event
from jaxloop._core.filters import Firing
from jaxloop._core.lazy import Known
from jaxloop._core.schedule import matches
from jaxloop._core.state import Snapshot
from jaxloop._program.metric_rows import Row, Rows
from jaxloop._spec import Attachment

Noticed = tuple[Attachment, Firing | None, Snapshot]


Counts = Mapping[Event, tuple[int, int]]


class Observers:
    """The observers of a run, and the firings that they have yet to see."""

    def __init__(self, observers: Sequence[Attachment]) -> None:
        self.all = tuple(observers)
        iteration = (Event.ITERATION_STARTED, Event.ITERATION_COMPLETED)
        # A clock is asked where blocks end, and not inside them.
        self._inner = [
            (order, one, event)
            for order, one in enumerate(self.all)
            for event in iteration
            if event in one.events and not filters.timed(one.filter)
        ]
        self._queue: list[Noticed] = []

    @property
    def look_inside(self) -> bool:
        """Whether any may see an iteration inside a block."""
        return bool(self._inner)

    def notice(self, one: Attachment, firing: Firing | None, snapshot: Snapshot) -> None:
        """Remembers a firing; ``firing`` is given where a function is still to be asked."""
        self._queue.append((one, firing, snapshot))

    def notice_block(
        self,
        fields: dict[str, Any],
        count: int,
        rows: Rows,
        extra: Mapping[str, Any],
    ) -> None:
        """Remembers the firings inside a block: all but its first start and its last completion.

        Args:
            fields: A snapshot's fields at the first iteration, whose start is counted.
            count: The iterations of the block.
            rows: The metrics after each iteration.
            extra: What handlers added to the metrics of the epoch.
        """
        counts: Counts = fields["_counts"][0]
        due: list[tuple[int, int, int, Attachment, Event]] = []
        for order, one, event in self._inner:
            total, epoch = counts[event]
            second = event is Event.ITERATION_STARTED
            for n in matches(one.filter, total, epoch, count - 1):
                due.append((2 * n + second, order, n, one, event))
        if not due:
            return
        due.sort(key=_when)
        rows.want(0, count)
        first_iteration, first_step = fields["iteration"], fields["step"]
        last: tuple[int, Snapshot] = (-1, Snapshot())
        for when, _, n, one, event in due:
            if when == last[0]:
                snapshot = last[1]
            else:
                started = n if event is Event.ITERATION_STARTED else n - 1
                mine = {
                    **fields,
                    "iteration": first_iteration + started,
                    "step": first_step + n,
                    "event": event,
                    "_counts": (counts, started, n),
                    "_metrics": Row(rows, n - 1, extra),
                }
                snapshot = Snapshot.of(mine)
                last = (when, snapshot)
            firing = None
            if filters.asks(one.filter):
                total, epoch = counts[event]
                firing = Firing(total + n, epoch + n, 0.0, lambda: None)
            self._queue.append((one, firing, snapshot))

    def take(self) -> list[Noticed]:
        """What was remembered, in order; it is forgotten here."""
        noticed, self._queue = self._queue, []
        return noticed


def due(noticed: list[Noticed]) -> Iterator[tuple[Attachment, Snapshot]]:
    """Those that are to run; filters that ask a function ask it here."""
    for one, firing, snapshot in noticed:
        if firing is None or one.filter.matches(firing._replace(view=Known(snapshot).get)):
            yield one, snapshot


def _when(due: tuple[int, int, int, Attachment, Event]) -> tuple[int, int]:
    return due[0], due[1]
