"""Observers, and the metrics that they look at: nothing is computed until somebody asks.

    rows = Rows(program, out.ring, number)
    watching.notice_block(fields, 64, rows, extra={})
    ...                                     # the next block is dispatched
    for observer, snapshot in due(watching.take()):
        observer.fn(snapshot)               # while the device works

What an observer will see is fixed when its event fires; when it runs is the driver's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxloop import filters
from jaxloop.compile import Program
from jaxloop.events import Event
from jaxloop.filters import Firing
from jaxloop.loop import Attachment
from jaxloop.state import Known, Lazy, PyTree, Snapshot

Noticed = tuple[Attachment, Firing | None, Snapshot]
Counts = Mapping[Event, tuple[int, int]]


class Rows:
    """The metrics after each iteration of a block.

    Args:
        program: What computes them.
        ring: The accumulators, one row an iteration.
        number: Gives an int32 scalar on the device.
    """

    __slots__ = ("_fetch", "_number", "_program", "_range", "_ring", "_values")

    def __init__(self, program: Program, ring: PyTree, number: Callable[[int], Any]) -> None:
        self._program, self._ring, self._number = program, ring, number
        self._range = (0, 0)
        self._fetch: Callable[[], dict[str, PyTree]] = dict
        self._values: list[tuple[str, Any, bool]] | None = None

    def want(self, start: int, stop: int) -> None:
        """Dispatches the computation of some rows, unless they are known to be wanted."""
        low, high = self._range
        if (low <= start and stop <= high) or self._ring is None:
            return
        self._fetch = self._program.values(self._ring, self._number(start), self._number(stop))
        self._range, self._values = (start, stop), None

    def release(self) -> None:
        """Lets the accumulators go: no more rows will be wanted."""
        self._ring = None

    def get(self, index: int) -> dict[str, Any]:
        """The metrics of one row, as NumPy values."""
        self.want(index, index + 1)
        if self._values is None:
            self._values = [
                (name, value, isinstance(value, np.ndarray) and value.ndim == 1)
                for name, value in self._fetch().items()
            ]
        # Copies: a view would keep the values of all the rows.
        return {
            name: value[index] if plain else jax.tree.map(lambda x: x[index].copy(), value)
            for name, value, plain in self._values
        }


class Row(Lazy):
    """One row of a block's metrics, with what handlers added to the epoch's."""

    __slots__ = ("_index", "_rows", "extra")

    def __init__(self, rows: Rows, index: int, extra: Mapping[str, Any]) -> None:
        super().__init__(self._read)
        self._index, self.extra = index, extra
        self._rows: Rows | None = rows

    def _read(self) -> dict[str, Any]:
        assert self._rows is not None
        row = self._rows.get(self._index)
        self._rows = None  # what is known needs no more of the block
        if not self.extra:
            return row
        return {**row, **{name: v for name, v in self.extra.items() if name not in row}}

    def start(self) -> None:
        """Dispatches the computation, without waiting."""
        if self._rows is not None:
            self._rows.want(self._index, self._index + 1)

    def keep(self) -> None:
        """As `start`, and lets the accumulators of the block go."""
        self.start()
        if self._rows is not None:
            self._rows.release()


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
            for n in filters.matches(one.filter, total, epoch, count - 1):
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
