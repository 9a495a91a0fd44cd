"""The metrics after each iteration of a block; nothing is computed until someone reads them.

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
        program: What computes them.
        ring: The accumulators, one row an iteration.
        number: Returns an int32 scalar on the device.
    """

    __slots__ = ("_fetch", "_number", "_program", "_range", "_ring", "_values")

    def __init__(self, program: Program, ring: PyTree, number: Callable[[int], Any]) -> None:
        self._program, self._ring, self._number = program, ring, number
        self._range = (0, 0)
        self._fetch: Callable[[], dict[str, PyTree]] = dict
        self._values: list[tuple[str, Any, bool]] | None = None

    def request(self, start: int, stop: int) -> None:
        """Dispatches the computation of some rows, unless they are requested already."""
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
        # Copies, because a view would keep the values of all the rows.
        return {
            name: value[index] if plain else jax.tree.map(lambda x: x[index].copy(), value)
            for name, value, plain in self._values
        }


class MetricRow(LazyDict):
    """One row of a block's metrics, with those that handlers added to the epoch's.

    Args:
        rows: The rows of the block.
        index: Which of them.
        extra: ``{name: value}`` that handlers added.
    """

    __slots__ = ("_index", "_rows", "extra")

    def __init__(self, rows: MetricRows, index: int, extra: Mapping[str, Any]) -> None:
        # Sets what LazyDict's own constructor would: one is made for every block.
        self._make, self._value = self._read, ReadOnlyDict()
        self._index, self.extra = index, extra
        self._rows: MetricRows | None = rows

    def _read(self) -> dict[str, Any]:
        assert self._rows is not None
        row = self._rows.get(self._index)
        self._rows = None  # known values need no more of the block
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
