"""The metrics after each iteration of a block, computed only when they are read.

    rows = MetricRows(program, ring, number)
    row = MetricRow(rows, 9, extra={})      # after the block's tenth iteration
    row.get()["loss"]                       # computed, copied to the host and waited for here

One computation and one transfer serve all rows that are requested together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxloop._core.lazy import LazyDict, ReadOnlyDict
from jaxloop._core.types import PyTree
from jaxloop._program.block import Program


class MetricRows:
    """The metrics after each iteration of one block.

    Args:
        program: The program that computes them.
        ring: The accumulators, one row per iteration.
        number: Returns an int32 scalar on the device.
    """

    __slots__ = ("_fetch", "_number", "_program", "_range", "_ring", "_values")

    def __init__(self, program: Program, ring: PyTree, number: Callable[[int], Any]) -> None:
        self._program, self._ring, self._number = program, ring, number
        self._range = (0, 0)
        self._fetch: Callable[[], dict[str, PyTree]] = dict
        self._values: list[tuple[str, Any, bool]] | None = None

    def request(self, start: int, stop: int) -> None:
        """Dispatches the computation of some rows, unless they are already requested."""
        low, high = self._range
        if (low <= start and stop <= high) or self._ring is None:
            return
        self._fetch = self._program.values(self._ring, self._number(start), self._number(stop))
        self._range, self._values = (start, stop), None

    def release(self) -> None:
        """Frees the accumulators. No more rows can be requested."""
        self._ring = None

    def get(self, index: int) -> dict[str, Any]:
        """Returns the metrics of one row, as NumPy values."""
        self.request(index, index + 1)
        if self._values is None:
            self._values = [
                (name, value, isinstance(value, np.ndarray) and value.ndim == 1)
                for name, value in self._fetch().items()
            ]
        # Copied, because a view would keep the values of all rows alive.
        row = {
            name: value[index] if plain else jax.tree.map(lambda x: x[index].copy(), value)
            for name, value, plain in self._values
        }
        return self._program.metrics.with_derived(row)


class MetricRow(LazyDict):
    """One row of a block's metrics, with the metrics that handlers added to the epoch.

    Args:
        rows: The rows of the block.
        index: The index of the row.
        extra: ``{name: value}`` that handlers added.
    """

    __slots__ = ("_index", "_rows", "extra")

    def __init__(self, rows: MetricRows, index: int, extra: Mapping[str, Any]) -> None:
        # Sets the fields of LazyDict directly, for speed: every block makes a row.
        self._make, self._value = self._read, ReadOnlyDict()
        self._index, self.extra = index, extra
        self._rows: MetricRows | None = rows

    def _read(self) -> dict[str, Any]:
        assert self._rows is not None
        row = self._rows.get(self._index)
        self._rows = None  # the values are known, so the block can be freed
        if not self.extra:
            return row
        return {**row, **{name: v for name, v in self.extra.items() if name not in row}}

    def start(self) -> None:
        """Dispatches the computation without waiting for it."""
        if self._rows is not None:
            self._rows.request(self._index, self._index + 1)

    def settle(self) -> None:
        """Dispatches the computation, and frees the accumulators of the block."""
        self.start()
        if self._rows is not None:
            self._rows.release()
