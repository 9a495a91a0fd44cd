"""Superbatches: batches of one signature in one buffer, ready for a block to read.

    pool = BufferPool(64, placement(state))
    arrays = pool.borrow(signature)         # host memory, reused when the device has read it
    ...                                     # write one batch per row
    superbatch = pool.superbatch(signature, arrays, value, count, signature)

A buffer is reused only after all of its batches were consumed and the device has read them, because
a device may read the host's memory directly.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxloop._core.batch import Batch, Signature
from jaxloop._core.placement import Placement
from jaxloop._core.types import PyTree
from jaxloop._data.device_rows import Rows, Stacked
from jaxloop._data.in_memory import Batches

_BUFFER_ALIGNMENT = 64
"""In bytes. The CPU backend uses memory with this alignment without copying it."""
_LENT_BUFFERS = 6
"""The number of buffers kept for reuse: two for blocks in flight, one waiting, one being filled,
and two spare. Older ones are dropped."""


class Superbatch:
    """Batches of one signature, ready for the device.

    Attributes:
        rows: The rows that a block reads from.
        num_left: The number of batches that are not consumed yet.
        next_row: The row of the next batch.
        signature: The signature of each batch.
        kept: The batches themselves, if they are from a one-shot iterator. Unconsumed ones are
            given back.
        marker: An array that is ready when the last block that reads this superbatch is done.
    """

    __slots__ = ("kept", "marker", "next_row", "num_left", "rows", "signature")

    def __init__(self, rows: Rows, count: int, signature: Signature, first_row: int = 0) -> None:
        self.rows, self.signature = rows, signature
        self.num_left, self.next_row = count, first_row
        self.kept: tuple[Batch, ...] = ()
        self.marker: Any = None

    def peek(self) -> PyTree:
        """Returns the next batch."""
        if self.kept:
            return self.kept[-self.num_left].value
        return self.rows.row(self.next_row)

    def is_done(self) -> bool:
        """Returns whether all batches are consumed and the device has read them."""
        return not self.num_left and self.marker is not None and bool(self.marker.is_ready())


class BufferPool:
    """A pool of host buffers from which superbatches are made.

    Attributes:
        num_rows: The maximum number of batches in a superbatch.
        place: The placement of arrays.
    """

    def __init__(self, num_rows: int, place: Placement) -> None:
        self.num_rows, self.place = num_rows, place
        self._lent: list[tuple[Signature, list[np.ndarray[Any, Any]], Superbatch]] = []

    def borrow(self, like: Signature) -> list[np.ndarray[Any, Any]]:
        """Returns an array of shape ``(num_rows, *shape)`` for each leaf, uninitialized."""
        for index, (signature, arrays, superbatch) in enumerate(self._lent):
            if superbatch.is_done() and (signature is like or signature == like):
                del self._lent[index]
                return arrays
        # New memory causes a page fault every 4 KiB, which costs far more than copying a batch.
        return [_aligned((self.num_rows, *shape), dtype) for shape, dtype in like.leaves]

    def superbatch(
        self,
        like: Signature,
        arrays: list[np.ndarray[Any, Any]],
        value: PyTree,
        count: int,
        signature: Signature,
    ) -> Superbatch:
        """Returns a superbatch of ``value``, which was made from the borrowed ``arrays``."""
        made = Superbatch(Stacked(self.place(value)), count, signature)
        self._lent.append((like, arrays, made))
        del self._lent[:-_LENT_BUFFERS]
        return made

    def superbatch_of(self, batches: list[Batch]) -> Superbatch:
        """Returns a superbatch of whole batches that cannot be copied row by row on the host."""
        filled = [*batches, *[batches[0]] * (self.num_rows - len(batches))]
        value = jax.tree.map(_stack_rows, *(one.value for one in filled))
        return Superbatch(Stacked(self.place(value)), len(batches), batches[0].signature)

    def put_once(self, batches: Batches) -> PyTree:
        """Returns the arrays of ``batches`` on the device, where they stay for the next run."""
        if self.place not in batches.placed:
            batches.placed[self.place] = self.place(batches.arrays)
        return batches.placed[self.place]


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + _BUFFER_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _BUFFER_ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _stack_rows(*rows: Any) -> Any:
    if any(isinstance(row, jax.Array) for row in rows):
        return jax.numpy.stack(rows)
    return rows[0][None] if len(rows) == 1 else np.stack(rows)


def is_on_host(leaf: Any) -> bool:
    """Returns whether the host can copy a leaf without access to another device."""
    if not isinstance(leaf, jax.Array):
        return True
    return not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) and (
        leaf.sharding.device_set == {jax.devices("cpu")[0]}
    )
