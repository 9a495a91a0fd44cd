"""The metrics after each iteration of a block, computed only when they are read.

    rows = MetricRows(program.values, ring, last, numbers, clock.wait)
    row = MetricRow(rows, 9, extra={})      # after the block's tenth iteration
    row.get()["loss"]                       # waited for and computed here

    pending = PendingRows(clock.wait)
    pending.add(row)                        # at the end of an epoch

All rows that are requested together are computed at once, and so are those of the epochs whose
metrics nobody has read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from jaxloop._core.lazy import LazyDict, ReadOnlyDict
from jaxloop._core.types import PyTree
from jaxloop._program.metric_values import Fetch, MetricValues, row_of
from jaxloop.metrics.packing import Packed

Wait: TypeAlias = Callable[[Callable[[], dict[str, PyTree]]], dict[str, PyTree]]
"""Returns what a function returns, and may measure how long that takes."""


class MetricRows:
    """The metrics after each iteration of one block.

    Args:
        values: Computes them.
        ring: The accumulators, one row per iteration.
        last: The accumulators after the last iteration. The next block may donate them.
        numbers: Int32 scalars on the device, by value.
        wait: Calls what waits for the device.
    """

    __slots__ = ("_fetch", "_numbers", "_range", "_ring", "_rows", "_wait", "last", "values")

    def __init__(
        self,
        values: MetricValues,
        ring: PyTree,
        last: Packed,
        numbers: Mapping[int, Any],
        wait: Wait,
    ) -> None:
        self.values, self.last, self._wait = values, last, wait
        self._ring, self._numbers = ring, numbers
        self._range = (0, 0)
        self._fetch: Fetch = dict
        self._rows: dict[str, PyTree] | None = None

    def request(self, start: int, stop: int) -> None:
        """Starts to compute some rows, unless they are already requested."""
        if self._ring is None or self.is_requested(start, stop):
            return
        self._fetch = self.values.start(self._ring, start, stop, self._numbers)
        self._range, self._rows = (start, stop), None

    def is_requested(self, start: int, stop: int) -> bool:
        """Returns whether some rows are computed already, or are being computed."""
        low, high = self._range
        return low <= start and stop <= high

    def release(self) -> None:
        """Frees the accumulators. No more rows can be requested."""
        self._ring = None

    def get(self, index: int) -> dict[str, Any]:
        """Returns the metrics of one row, as NumPy values."""
        self.request(index, index + 1)
        if self._rows is None:
            self._rows = self._wait(self._fetch)
        return self.values.derived(row_of(self._rows, index - self._range[0]))


class MetricRow(LazyDict):
    """One row of a block's metrics, with the metrics that handlers added to the epoch.

    Args:
        rows: The rows of the block.
        index: The index of the row.
        extra: ``{name: value}`` that handlers added.

    Attributes:
        rows: The rows of the block, or None if they are not needed any more.
    """

    __slots__ = ("_index", "_pending", "extra", "rows")

    def __init__(self, rows: MetricRows, index: int, extra: Mapping[str, Any]) -> None:
        # Sets the fields of LazyDict directly, for speed: every block makes a row.
        self._make, self._value = self._read, ReadOnlyDict()
        self._index, self.extra = index, extra
        self.rows: MetricRows | None = rows
        self._pending: PendingRows | None = None

    def _read(self) -> ReadOnlyDict:
        # Another thread may do the same at any time, so what is read comes before what is freed.
        rows, pending = self.rows, self._pending
        if pending is not None:
            pending.compute()
        elif self._make is not None:
            assert rows is not None
            self.set(rows.get(self._index))
        return self._value

    def adding(self, values: Mapping[str, Any]) -> LazyDict:
        """Returns the row with more values of handlers."""
        if self.rows is None:
            return super().adding(values)
        return MetricRow(self.rows, self._index, {**self.extra, **values})

    def start(self) -> None:
        """Starts the computation without waiting for it."""
        if self.rows is not None:
            self.rows.request(self._index, self._index + 1)

    def settle(self) -> None:
        """Starts the computation, and frees the accumulators of the block."""
        self.start()
        if self.rows is not None:
            self.rows.release()

    def defer(self, pending: PendingRows) -> MetricRows | None:
        """Lets ``pending`` compute the row from the last accumulators, and frees the others.

        Returns:
            The rows of the block, or None if it is not worth it or not possible.
        """
        rows = self.rows
        if rows is None or rows.is_requested(self._index, self._index + 1):
            return None
        if not rows.values.on_host or any(one.is_deleted() for one in rows.last):
            return None
        self.rows, self._pending = None, pending
        return rows

    def set(self, row: Mapping[str, Any]) -> None:
        """Sets the values, and frees the block."""
        added = {name: value for name, value in self.extra.items() if name not in row}
        self._value = ReadOnlyDict({**row, **added})
        self._make = self._pending = self.rows = None


class PendingRows:
    """The last rows of ended epochs, which are computed together when one of them is read.

    A thread that saves a state may be the one that reads.

    Args:
        wait: Calls what waits for the device.
    """

    def __init__(self, wait: Wait) -> None:
        self._wait = wait
        self._lock = threading.Lock()
        self._values: MetricValues | None = None
        self._rows: list[tuple[MetricRow, Packed]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: MetricRow) -> bool:
        """Adds the row of the last iteration of an epoch, and returns whether that is possible.

        The next epoch starts with fresh accumulators, so no block donates those of the row.
        """
        with self._lock:
            rows = row.defer(self)
            if rows is None:
                return False
            if self._values is not rows.values:
                self._compute(0)
            self._values = rows.values
            self._rows.append((row, rows.last))
        return True

    def compute(self, *, but: int = 0) -> None:
        """Computes all rows but the newest ones. It waits for the device."""
        with self._lock:
            self._compute(but)

    def _compute(self, but: int) -> None:
        num_due = len(self._rows) - but
        if num_due < 1 or self._values is None:
            return
        due, of_rows = self._rows[:num_due], self._values.of_rows
        values = self._wait(lambda: of_rows([packed for _, packed in due]))
        for index, (row, _) in enumerate(due):
            row.set(self._values.derived(row_of(values, index)))
        del self._rows[:num_due]
