"""Superbatches: batches of one signature in one buffer, ready for a block to read.

    pool = BufferPool(64, placement(state))
    arrays = pool.borrow(signature)         # host memory, reused when the device has read it
    ...                                     # write one batch per row
    superbatch = pool.superbatch(signature, arrays, value, count, signature)

A buffer is reused only after all of its batches were consumed and the device has read them, because
a device may read the host's memory directly. If it does, the `jax.Array` that reads the buffer's
memory is reused with it, because making one takes as long as copying a hundred small batches.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import numpy as np

from jaxloop._core.batch import Batch, Signature
from jaxloop._core.placement import Placement
from jaxloop._core.types import PyTree
from jaxloop._data.device_rows import Rows, Stacked
from jaxloop._data.in_memory import Batches
from jaxloop._data.rows import Target

_BUFFER_ALIGNMENT = 64
"""In bytes. The CPU backend uses memory with this alignment without copying it."""
_KEPT_BYTES = 16 * 2**20
"""The maximum size of the buffers that a run leaves to the next one. New memory costs a run with
many short epochs, or a validation, more than reading its batches."""
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
        source: Where `unread` finds the batches: the arrays of the buffer, or the batches. None if
            the data can return them again.
        marker: An array that is ready when the last block that reads this superbatch is done.
    """

    __slots__ = ("marker", "next_row", "num_left", "rows", "signature", "source")

    def __init__(self, rows: Rows, count: int, signature: Signature, first_row: int = 0) -> None:
        self.rows, self.signature = rows, signature
        self.num_left, self.next_row = count, first_row
        self.source: list[np.ndarray[Any, Any]] | tuple[Batch, ...] | None = None
        self.marker: Any = None

    def peek(self) -> PyTree:
        """Returns the next batch."""
        return self.rows.row(self.next_row)

    def unread(self) -> list[Batch]:
        """Returns the batches that are not consumed, which a one-shot iterator gives only once."""
        source, start, count = self.source, self.next_row, self.num_left
        if source is None or not count:
            return []
        if isinstance(source, tuple):
            return list(source[start : start + count])
        return batches_in(source, self.signature, start, count)

    def is_done(self) -> bool:
        """Returns whether all batches are consumed and the device has read them."""
        return not self.num_left and self.marker is not None and bool(self.marker.is_ready())


class BufferPool:
    """A pool of host buffers from which superbatches are made.

    Args:
        num_rows: The maximum number of batches in a superbatch.
        place: The placement of arrays.
        kept: The buffers that earlier runs left. A pool takes them out, so no two runs share them.

    Attributes:
        num_rows: See above.
        place: See above.
    """

    def __init__(self, num_rows: int, place: Placement, kept: KeptBuffers | None = None) -> None:
        self.num_rows, self.place = num_rows, place
        self._kept = {} if kept is None else kept
        self._lent: list[_Buffer] = self._kept.pop((num_rows, place), [])
        self._borrowed: _Buffer | None = None

    def keep(self) -> None:
        """Leaves the buffers that nobody reads any more to the next run."""
        kept, size = [], 0
        for buffer in self._lent:
            size += sum(array.nbytes for array in buffer.arrays)
            if size > _KEPT_BYTES:
                break
            if buffer.superbatch is not None and buffer.superbatch.is_done():
                kept.append(buffer)
        self._lent = []
        self._kept[self.num_rows, self.place] = kept

    def borrow(self, like: Signature) -> list[np.ndarray[Any, Any]]:
        """Returns an array of shape ``(num_rows, *shape)`` for each leaf, uninitialized.

        One buffer is borrowed at a time, until `superbatch` or the next `borrow`.
        """
        for index, buffer in enumerate(self._lent):
            same = buffer.like is like or buffer.like == like
            if same and buffer.superbatch is not None and buffer.superbatch.is_done():
                del self._lent[index]
                break
        else:
            # New memory causes a page fault every 4 KiB, which costs far more than copying a batch.
            arrays = [_aligned((self.num_rows, *shape), dtype) for shape, dtype in like.leaves]
            buffer = _Buffer(like, arrays)
        self._borrowed = buffer
        return buffer.arrays

    def target(self) -> Target:
        """Returns the rows of the borrowed buffer."""
        buffer = self._borrowed
        assert buffer is not None
        if buffer.target is None:
            buffer.target = Target(buffer.arrays, buffer.like)
        elif buffer.superbatch is not None:
            buffer.target.used(buffer.superbatch.next_row)
        return buffer.target

    def superbatch(
        self,
        like: Signature,
        arrays: list[np.ndarray[Any, Any]],
        value: PyTree,
        count: int,
        signature: Signature,
    ) -> Superbatch:
        """Returns a superbatch of ``value``, which was made from the borrowed ``arrays``."""
        buffer, self._borrowed = self._borrowed, None
        assert buffer is not None and buffer.arrays is arrays
        leaves, tree = jax.tree.flatten(value)
        placed = jax.tree.unflatten(tree, self._placed(buffer, leaves))
        buffer.superbatch = made = Superbatch(Stacked(placed), count, signature)
        self._lent.append(buffer)
        del self._lent[:-_LENT_BUFFERS]
        return made

    def _placed(self, buffer: _Buffer, leaves: list[Any]) -> list[Any]:
        """Returns the leaves where blocks read them. Those that are in the buffer may be known."""
        aliases = buffer.aliases
        placed = [aliases.get(id(leaf)) for leaf in leaves]
        # A program whose options donate its batches deletes them.
        missing = [i for i, x in enumerate(placed) if x is None or x.is_deleted()]
        if missing:
            mine = {id(array) for array in buffer.arrays}
            for i, array in zip(missing, self.place([leaves[i] for i in missing]), strict=True):
                placed[i] = array
                if id(leaves[i]) in mine and _reads(array, leaves[i]):
                    aliases[id(leaves[i])] = array
        return placed

    def superbatch_of(self, batches: list[Batch]) -> Superbatch:
        """Returns a superbatch of whole batches that cannot be copied row by row on the host."""
        filled = [*batches, *[batches[0]] * (self.num_rows - len(batches))]
        value = jax.tree.map(_stack_rows, *(one.value for one in filled))
        made = Superbatch(Stacked(self.place(value)), len(batches), batches[0].signature)
        made.source = tuple(batches)
        return made

    def put_once(self, batches: Batches) -> PyTree:
        """Returns the arrays of ``batches`` on the device, where they stay for the next run."""
        arrays = batches.placed.get(self.place)
        if arrays is None:
            arrays = batches.placed[self.place] = self.place(batches.arrays)
        return arrays


class _Buffer:
    """The arrays of a buffer.

    Attributes:
        like: The signature that it was made for.
        arrays: An array for each leaf.
        target: Its rows, when they were asked for.
        aliases: The arrays of JAX that read the memory of one of ``arrays``, by its ``id``.
        superbatch: The superbatch that it was last lent to, or None.
    """

    __slots__ = ("aliases", "arrays", "like", "superbatch", "target")

    def __init__(self, like: Signature, arrays: list[np.ndarray[Any, Any]]) -> None:
        self.like, self.arrays = like, arrays
        self.target: Target | None = None
        self.aliases: dict[int, jax.Array] = {}
        self.superbatch: Superbatch | None = None


KeptBuffers: TypeAlias = dict[tuple[int, Placement], list[_Buffer]]
"""Buffers by the number of their rows and their placement."""


def _reads(placed: Any, array: np.ndarray[Any, Any]) -> bool:
    """Returns whether an array of JAX reads the memory of a NumPy array, and is no copy of it.

    JAX promises neither, so this compares addresses. Only those of a CPU are comparable.
    """
    if not isinstance(placed, jax.Array) or not array.nbytes:
        return False
    devices = placed.devices()
    return (
        len(devices) == 1
        and next(iter(devices)).platform == "cpu"
        and (placed.shape, placed.dtype) == (array.shape, array.dtype)
        and placed.unsafe_buffer_pointer() == array.ctypes.data
    )


def batches_in(
    arrays: list[np.ndarray[Any, Any]], signature: Signature, start: int, count: int
) -> list[Batch]:
    """Returns copies of the batches in ``count`` rows of a buffer from ``start`` on."""
    copies = [array[start : start + count].copy() for array in arrays]
    unflatten = signature.tree.unflatten
    return [Batch(unflatten([c[i, ...] for c in copies]), signature) for i in range(count)]


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
