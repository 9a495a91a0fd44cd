"""Readers, which hold a position in a data set and fill the next superbatch from there.

    reader = IteratorReader(iter(data), epoch=0, one_shot=False)
    reader = ArrayReader(batches, epoch=0, index=0)
    fill = Fill(reader, limit=64, pool=pool, late=None)
    fill.run()                              # here, or in a thread
    fill.superbatch, fill.error

If the data raise an error, it is raised in order: after the superbatch of the preceding batches.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any, Final

import jax
import numpy as np

from jaxloop._core.batch import Batch, Signature, as_batch
from jaxloop._core.types import PyTree
from jaxloop._data.device_rows import Gathered
from jaxloop._data.in_memory import Batches
from jaxloop._data.iterator_reader import IteratorReader
from jaxloop._data.padding import marked
from jaxloop._data.position import Position
from jaxloop._data.superbatch import BufferPool, Superbatch

Late = Callable[[], bool]
"""Called between batches. Returns whether a superbatch must end with the batches it has."""

_END: Final = object()


class Fill:
    """A request to fill a superbatch, possibly in the thread.

    Attributes:
        superbatch: The result, or None if no batch was left.
        error: The error that the data raised, or None.
        finished: Whether it has run.
        done: Gets an item when it has run in the thread, for another thread that waits.
        late: Called between batches, or None. It may change while the request runs.
    """

    __slots__ = ("done", "error", "finished", "late", "limit", "pool", "reader", "superbatch")

    def __init__(self, reader: Reader, limit: int, pool: BufferPool, late: Late | None) -> None:
        self.reader, self.limit, self.pool = reader, limit, pool
        self.finished = False
        self.done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.late = late
        self.superbatch: Superbatch | None = None
        self.error: BaseException | None = None

    def hurry(self) -> None:
        """Finishes the superbatch with the batches it has."""
        self.late = _always

    def run(self) -> None:
        """Fills the superbatch."""
        try:
            self.superbatch = self.reader.fill(self)
        except BaseException as error:  # the waiting thread raises it
            self.error = error
        self.finished = True


def _always() -> bool:
    return True


class ArrayReader:
    """A position in `Batches`: two integers."""

    num_skipped = 0

    def __init__(self, batches: Batches, epoch: int, index: int) -> None:
        self.epoch, self.num_read, self.num_consumed = epoch, index, index
        self.length = len(batches)
        self.batches = batches
        self._position = Position(settings=batches.settings)
        self._order: Any = _END  # drawn when it is first needed

    def position(self) -> Position:
        """Returns the position: the settings, as the counters say the rest."""
        return self._position

    def has_more(self) -> bool:
        """Returns whether another batch follows."""
        return self.num_read < self.length

    def sample(self) -> Batch | None:
        """Returns the next batch without consuming it, or None at the end of the data."""
        for value in self.batches.epoch(self.epoch, self.num_read):
            return as_batch(value, f"batch {self.num_read} of the data")
        return None

    def fill(self, request: Fill) -> Superbatch | None:
        """Returns the next batches in one gather, or None at the end of the data."""
        batches, index, size = self.batches, self.num_read, self.batches.batch_size
        if index >= len(batches):
            return None
        if self._order is _END:
            self._order = batches.order(self.epoch)
        full = len(batches) if batches.pad else batches.num_examples // size
        if index < full and batches.device:
            self.num_read = full
            return self._on_device(index, full - index, request.pool)
        # A last batch that is not full has a different shape.
        count = min(request.limit, full - index) if index < full else 1
        self.num_read = index + count
        low = index * size
        size = size if index < full else batches.num_examples - low
        where = batches.examples(self._order, low, low + count * size)
        leaves, tree = jax.tree.flatten(batches.arrays)
        signature = Signature(tree, tuple(((size, *a.shape[1:]), a.dtype) for a in leaves))
        arrays = request.pool.borrow(signature)
        for buffer, leaf in zip(arrays, leaves, strict=True):
            filled = buffer.reshape(-1, *leaf.shape[1:])[: count * size]
            if isinstance(where, slice):
                filled[:] = leaf[where]
            else:
                np.take(leaf, where, axis=0, out=filled, mode="clip")  # "raise" copies twice
        value = jax.tree.unflatten(tree, arrays)
        made_of = signature
        if batches.pad:
            value = _marked_rows(value, low, count, size, batches.num_examples)
            leaves, tree = jax.tree.flatten(value)
            signature = Signature(tree, tuple((a.shape[1:], a.dtype) for a in leaves))
        return request.pool.superbatch(made_of, arrays, value, count, signature)

    def _on_device(self, index: int, count: int, pool: BufferPool) -> Superbatch:
        batches = self.batches
        order = None if self._order is None else pool.place(self._order.astype(np.int32))
        sample = as_batch(next(batches.epoch(self.epoch, index)), "the data")
        rows = Gathered(
            pool.put_once(batches), order, batches.batch_size, batches.num_examples, batches.pad
        )
        return Superbatch(rows, count, sample.signature, index)


def _marked_rows(value: PyTree, low: int, count: int, size: int, num_examples: int) -> PyTree:
    """Returns a stack of batches with the mask of ``pad``. Rows from ``count`` on are unused."""
    mask = np.zeros((len(jax.tree.leaves(value)[0]), size), bool)
    places = np.arange(low, low + count * size)
    mask.reshape(-1)[: count * size] = places < num_examples
    if isinstance(value, tuple | list) and len(value) == 3:
        value[2][count:] = 0  # unused rows have arbitrary values, and are multiplied too
    return marked(value, mask)


Reader = IteratorReader | ArrayReader
