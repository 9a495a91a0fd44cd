"""The metrics after each iteration of a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxloop._core.lazy import Lazy
from jaxloop._core.types import PyTree
from jaxloop._program.block import Program


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
