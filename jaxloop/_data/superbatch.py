"""Stacks: batches of one signature in one buffer, ready for a block to read.

    maker = Maker(64, placement(state))
    arrays = maker.borrow(signature)        # memory of the host, used again when it is free
    ...                                     # a batch a row
    stack = maker.stack(signature, arrays, value, count, signature)

A buffer is lent again only when all of its batches were consumed and the device has read them: a
device may read the very memory of the host.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxloop._core.batch import Batch, Signature
from jaxloop._core.placement import Placement
from jaxloop._core.types import PyTree
from jaxloop._data.device_rows import Stacked
from jaxloop._data.in_memory import Batches

BUFFER_ALIGNMENT = 64
"""Bytes; the CPU backend takes memory that is aligned so without a copy."""


LENT_BUFFERS = 6
"""Buffers that are looked after: two blocks in flight, one waiting, one being filled, two spare;
more are simply dropped."""


class Stack:
    """Batches of one signature, ready for the device.

    Attributes:
        source: What a block reads.
        count: How many batches.
        first: The row of the first of them.
        kept: The batches themselves, of a one-shot iterator: what is not consumed goes back.
        taken: How many of them were consumed.
        marker: An array that is ready when the last block that reads this stack is done.
    """

    __slots__ = ("count", "first", "kept", "marker", "signature", "source", "taken")

    def __init__(self, source: Any, count: int, signature: Signature, first: int = 0) -> None:
        self.source, self.count, self.signature, self.first = source, count, signature, first
        self.kept: tuple[Batch, ...] = ()
        self.taken = 0
        self.marker: Any = None

    @property
    def left(self) -> int:
        """How many batches were not consumed."""
        return self.count - self.taken

    @property
    def done(self) -> bool:
        """Whether the device has read all of it."""
        return not self.left and self.marker is not None and bool(self.marker.is_ready())


class Maker:
    """Makes stacks: knows their size, where arrays belong, and which buffers are free again."""

    def __init__(self, rows: int, place: Placement) -> None:
        self.rows, self.place = rows, place
        self._lent: list[tuple[Signature, list[np.ndarray[Any, Any]], Stack]] = []

    def borrow(self, like: Signature) -> list[np.ndarray[Any, Any]]:
        """Arrays of shape ``(rows, *shape)``, a leaf each, whose contents nobody needs."""
        for index, (mine, arrays, stack) in enumerate(self._lent):
            if stack.done and (mine is like or mine == like):
                del self._lent[index]
                return arrays
        # Fresh memory costs a page fault every 4 KiB, many times what copying a batch costs.
        return [_aligned((self.rows, *shape), dtype) for shape, dtype in like.leaves]

    def stack(
        self,
        like: Signature,
        arrays: list[np.ndarray[Any, Any]],
        value: PyTree,
        count: int,
        signature: Signature,
    ) -> Stack:
        """A stack of ``value``, which was made from the borrowed ``arrays``."""
        made = Stack(Stacked(self.place(value)), count, signature)
        self._lent.append((like, arrays, made))
        del self._lent[:-LENT_BUFFERS]
        return made

    def put_once(self, batches: Batches) -> PyTree:
        """The arrays of ``batches`` on the device; they stay there for the next run."""
        if self.place not in batches.placed:
            batches.placed[self.place] = self.place(batches.arrays)
        return batches.placed[self.place]

    def stack_of(self, batches: list[Batch]) -> Stack:
        """A stack of whole batches: those that a device has already, or one that is large."""
        filled = [*batches, *[batches[0]] * (self.rows - len(batches))]
        value = jax.tree.map(_stack_rows, *(one.value for one in filled))
        return Stack(Stacked(self.place(value)), len(batches), batches[0].signature)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + BUFFER_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % BUFFER_ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _stack_rows(*rows: Any) -> Any:
    if any(isinstance(row, jax.Array) for row in rows):
        return jax.numpy.stack(rows)
    return rows[0][None] if len(rows) == 1 else np.stack(rows)


def on_host(leaf: Any) -> bool:
    """Whether a leaf can be copied by the host without asking another device."""
    if not isinstance(leaf, jax.Array):
        return True
    return not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) and (
        leaf.sharding.device_set == {jax.devices("cpu")[0]}
    )
