"""The reader of arrays in memory.

    reader = ArrayReader(batches, epoch=0, index=0, epoch_arrays=EpochArrays(None))
    fill = Fill(reader, limit=64, pool=pool, late=None)
    fill.run()                              # draws the order of the epoch
    reader.begin(fill.superbatch)           # the device has no other use for the epoch before

Its position is two integers, the epoch and the number of batches. It draws the order of its epoch
once.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Final

import jax
import numpy as np

from jaxloop._core.arrays import size_bytes
from jaxloop._core.batch import Batch, Signature, as_batch
from jaxloop._core.placement import Placement
from jaxloop._core.types import PyTree
from jaxloop._data.device_rows import Gathered, Stacked, take_examples
from jaxloop._data.in_memory import Batches
from jaxloop._data.padding import marked
from jaxloop._data.position import Position
from jaxloop._data.superbatch import BufferPool, Superbatch

if TYPE_CHECKING:
    from jaxloop._data.readers import Fill

_NOT_DRAWN: Final = object()
_LEAF = jax.tree.structure(0)

_THREADED_GATHER_BYTES = 512 * 2**10
"""XLA on CPU runs a gather on several threads if it may access this many bytes, and it counts the
whole array. Inside a block, where the gather is small, that makes a step up to 1.5 times slower."""
_EPOCH_GATHER_BYTES = 256 * 2**20
"""The maximum size of arrays that are gathered once per epoch, which doubles their memory. Steps on
larger arrays usually take so long that a gather in each of them costs little."""
_QUICK_SHUFFLE = 65_536
"""A permutation of so many examples takes half a millisecond. The thread draws longer ones."""


class EpochArrays:
    """The orders of the epochs of one run on the device, and the arrays in the current order.

    Each epoch is gathered into the memory of the epoch before, so the run needs the memory of its
    arrays twice and no new page.

    Args:
        most: The maximum number of batches in an epoch, or None. What follows them is not gathered.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._arrays: PyTree = None
        self._decisions: dict[Placement, bool] = {}
        self._orders = BufferPool(1, Placement())

    def superbatch(
        self, batches: Batches, order: np.ndarray[Any, Any] | None, index: int, pool: BufferPool
    ) -> Superbatch:
        """Returns the full batches of an epoch from ``index`` on, as many as it may have."""
        arrays = pool.put_once(batches)
        sizes = batches.batch_size, batches.num_examples, batches.pad
        full = batches.num_full
        count = full - index if self._most is None else max(1, min(full, self._most) - index)
        if order is None:
            return Superbatch(Gathered(arrays, None, *sizes), count, batches.signature, index)
        if self._orders.place is not pool.place:
            self._arrays, self._orders = None, BufferPool(1, pool.place)
        like = Signature(_LEAF, ((order.shape, np.dtype(np.int32)),))
        buffers = self._orders.borrow(like)
        np.copyto(buffers[0][0], order, casting="same_kind")
        made = self._orders.superbatch(like, buffers, buffers[0], count, batches.signature)
        assert isinstance(made.rows, Stacked)
        made.rows, made.next_row = Gathered(arrays, made.rows.value, *sizes), index
        return made

    def are_used(self, batches: Batches, place: Placement) -> bool:
        """Returns whether all arrays are gathered at once, or each batch inside the block.

        It depends on the platform and on the sizes of the arrays alone, so no two runs differ.
        """
        if place not in self._decisions:
            self._decisions[place] = _is_faster_at_once(batches, place)
        return self._decisions[place]

    def gather(self, batches: Batches, order: Any, pool: BufferPool) -> PyTree:
        """Returns all arrays in this order. Those of the epoch before can no longer be used."""
        if self._arrays is None:
            # The first epoch overwrites a copy of the arrays, so one executable serves all epochs.
            stop = None if self._most is None else self._most * batches.batch_size
            self._arrays = pool.place(jax.tree.map(lambda a: a[:stop], batches.arrays))
        self._arrays = _gather_into(self._arrays, pool.put_once(batches), order)
        return self._arrays

    def release(self) -> None:
        """Drops the arrays. A run that has ended may be part of a cycle, and be freed late."""
        self._arrays, self._orders = None, BufferPool(1, Placement())


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _gather_into(spare: PyTree, arrays: PyTree, order: Any) -> PyTree:
    # The values of `spare` are not used. XLA writes the result to its memory.
    return take_examples(arrays, order.reshape(-1)[: len(jax.tree.leaves(spare)[0])])


def _is_faster_at_once(batches: Batches, place: Placement) -> bool:
    # On a GPU, the gather of a batch is one kernel, as is a slice, whatever the size of the array.
    if not place.known or _platform(place) != "cpu":
        return False
    sizes = [a.nbytes + a[:1].nbytes * batches.batch_size for a in jax.tree.leaves(batches.arrays)]
    order_bytes = batches.num_examples * np.dtype(np.int32).itemsize
    return (
        max(sizes) + order_bytes >= _THREADED_GATHER_BYTES
        and size_bytes(batches.arrays) <= _EPOCH_GATHER_BYTES
    )


def _platform(place: Placement) -> Any:
    devices: Any = jax.devices() if place.device is None else [place.device]
    if place.sharding is not None:
        devices = place.sharding.device_set
    return next(iter(devices)).platform


class ArrayReader:
    """A position in `Batches`: two integers.

    Args:
        batches: The batches.
        epoch: The epoch.
        index: The number of its batches that were read before.
        epoch_arrays: The memory for the arrays of an epoch, which the epochs of a run share.

    Attributes:
        is_quick: Whether a superbatch takes less time than a thread is worth. If the arrays are on
            the device, it needs only the order of the epoch.
    """

    num_skipped = 0

    def __init__(self, batches: Batches, epoch: int, index: int, epoch_arrays: EpochArrays) -> None:
        self.epoch, self.num_read, self.num_consumed = epoch, index, index
        self.length = len(batches)
        self.batches = batches
        short = not batches.shuffle or batches.num_examples <= _QUICK_SHUFFLE
        self.is_quick = batches.device and short
        self._epoch_arrays = epoch_arrays
        self._drawn: Any = _NOT_DRAWN

    @property
    def _order(self) -> np.ndarray[Any, Any] | None:
        """The order of the epoch, drawn when it is first needed."""
        if self._drawn is _NOT_DRAWN:
            self._drawn = self.batches.order(self.epoch)
        order: np.ndarray[Any, Any] | None = self._drawn
        return order

    def position(self) -> Position:
        """Returns the position: the settings, as the counters say the rest."""
        return self.batches.position

    def has_more(self) -> bool:
        """Returns whether another batch follows."""
        return self.num_read < self.length

    def sample(self) -> Batch | None:
        """Returns the next batch without consuming it, or None at the end of the data."""
        if not self.has_more():
            return None
        value = self.batches.batch(self._order, self.num_read)
        return as_batch(value, f"batch {self.num_read} of the data")

    def fill(self, request: Fill) -> Superbatch | None:
        """Returns the next batches in one gather, or None at the end of the data."""
        batches, index = self.batches, self.num_read
        if index >= self.length:
            return None
        full = batches.num_full
        if index < full and batches.device:
            made = self._epoch_arrays.superbatch(batches, self._order, index, request.pool)
            self.num_read = index + made.num_left
            return made
        # A last batch that is not full has a different shape.
        if batches.device and self._order is None:
            self.num_read = self.length
            return self._last_on_device(request.pool)
        count = min(request.limit, full - index) if index < full else 1
        self.num_read = index + count
        return self._on_host(index, count, request.pool)

    def begin(self, superbatch: Superbatch, pool: BufferPool) -> None:
        """Gathers the arrays of the epoch on the device, if that is done at once.

        All blocks of the epoch before must have been dispatched.
        """
        rows = superbatch.rows
        if not isinstance(rows, Gathered) or rows.order is None:
            return
        if self._epoch_arrays.are_used(self.batches, pool.place):
            arrays = self._epoch_arrays.gather(self.batches, rows.order, pool)
            superbatch.rows = dataclasses.replace(rows, arrays=arrays, order=None)

    def _last_on_device(self, pool: BufferPool) -> Superbatch:
        batches, arrays = self.batches, pool.put_once(self.batches)
        first = batches.num_full * batches.batch_size
        size, tree = batches.num_examples - first, batches.signature.tree
        leaves = tuple(((size, *shape[1:]), dtype) for shape, dtype in batches.signature.leaves)
        rows = Gathered(arrays, None, size, batches.num_examples, False, first)
        return Superbatch(rows, 1, Signature(tree, leaves))

    def _on_host(self, index: int, count: int, pool: BufferPool) -> Superbatch:
        batches, size = self.batches, self.batches.batch_size
        low = index * size
        if not batches.pad:
            size = min(size, batches.num_examples - low)
        where = batches.examples(self._order, low, low + count * size)
        leaves, tree = jax.tree.flatten(batches.arrays)
        signature = Signature(tree, tuple(((size, *a.shape[1:]), a.dtype) for a in leaves))
        arrays = pool.borrow(signature)
        for buffer, leaf in zip(arrays, leaves, strict=True):
            filled = buffer.reshape(-1, *leaf.shape[1:])[: count * size]
            if isinstance(where, slice):
                filled[:] = leaf[where]
            else:
                np.take(leaf, where, axis=0, out=filled, mode="clip")  # "raise" copies twice
        value = jax.tree.unflatten(tree, arrays)
        if not batches.pad:
            return pool.superbatch(signature, arrays, value, count, signature)
        value = _marked_rows(value, low, count, size, batches.num_examples)
        return pool.superbatch(signature, arrays, value, count, batches.signature)


def _marked_rows(value: PyTree, low: int, count: int, size: int, num_examples: int) -> PyTree:
    """Returns a stack of batches with the mask of ``pad``. Rows from ``count`` on are unused."""
    mask = np.zeros((len(jax.tree.leaves(value)[0]), size), bool)
    places = np.arange(low, low + count * size)
    mask.reshape(-1)[: count * size] = places < num_examples
    if isinstance(value, tuple | list) and len(value) == 3:
        value[2][count:] = 0  # unused rows have arbitrary values, and are multiplied too
    return marked(value, mask)
