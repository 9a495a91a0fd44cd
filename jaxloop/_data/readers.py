"""Cursors: positions in a data set, from which the next stack is filled.

    cursor = Iterating(iter(data), epoch=0, one_shot=False)
    cursor = Serving(batches, epoch=0, index=0)
    fill = Fill(cursor, limit=64, maker=maker, late=None)
    fill.run()                              # here, or in a thread
    fill.done.wait()
    fill.stack, fill.error

An error of the data is raised where its batch belongs: after the stack of the batches before it.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxloop._core.batch import Batch, Signature, as_batch
from jaxloop._data.device_rows import Gathered
from jaxloop._data.in_memory import Batches
from jaxloop._data.padding import marked
from jaxloop._data.position import Stateful
from jaxloop._data.superbatch import Maker, Stack, on_host
from jaxloop.errors import DataError

Late = Callable[[], bool]


END = object()


MARK_EVERY = 64
"""At most so many batches have to be read again to be where the iterator's own state is not."""


class Fill:
    """A stack that is being filled, maybe by the thread.

    Attributes:
        late: Asked between batches: whether the stack is to end with those that are there.
    """

    __slots__ = ("cursor", "done", "error", "late", "limit", "maker", "stack")

    def __init__(self, cursor: Cursor, limit: int, maker: Maker, late: Late | None) -> None:
        self.cursor, self.limit, self.maker = cursor, limit, maker
        self.done = threading.Event()
        self.late: Late = late or _never
        self.stack: Stack | None = None
        self.error: BaseException | None = None

    def hurry(self) -> None:
        """Ends the stack with the batches that are there."""
        self.late = _always

    def run(self) -> None:
        """Fills it."""
        try:
            self.stack = self.cursor.fill(self.limit, self.maker, self)
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            self.error = error
        self.done.set()


def _never() -> bool:
    return False


def _always() -> bool:
    return True


class Iterating:
    """A position in an iterator.

    Args:
        iterator: What is read.
        epoch: Its epoch.
        one_shot: Whether it goes on over epochs.
        own: Its own state, if it has one.
        read: How many of its batches are behind it.
    """

    def __init__(
        self,
        iterator: Iterator[Any],
        epoch: int,
        one_shot: bool,
        own: Stateful | None = None,
        read: int = 0,
    ) -> None:
        self.epoch, self.one_shot = epoch, one_shot
        self.length: int | None = None
        self.read = self.consumed = read
        self.skipped = 0
        self.held: collections.deque[Batch] = collections.deque()
        self._iterator, self._own = iterator, own
        self._marks: list[tuple[int, Any, bool]] = []
        self._error: BaseException | None = None
        self._like: Signature | None = None
        self._mark()

    def _mark(self, at_end: bool = False) -> None:
        """Remembers the iterator's own state, and how many batches were read of it by then."""
        if self._own is None:
            return
        # What is before the last mark that was consumed will not be asked for. A list is never
        # changed: the thread makes marks while the driver looks at them.
        behind = sum(mark[0] <= self.consumed for mark in self._marks)
        self._marks = [*self._marks[max(0, behind - 1) :], (self.read, self._own.get(), at_end)]

    def mark(self) -> tuple[int, Any, bool]:
        """``(skip, state, at_end)``: ``skip`` batches after that state comes what is next."""
        known = [mark for mark in self._marks if mark[0] <= self.consumed]
        at, state, at_end = known[-1] if known else (self.consumed, None, False)
        return self.consumed - at, state, at_end

    def skip(self, count: int, poll: Callable[[], None]) -> None:
        """Reads past ``count`` batches that were consumed in an earlier run."""
        for index in range(count):
            poll()  # it may take long
            if next(self._iterator, END) is END:
                raise DataError(
                    f"epoch {self.epoch} goes on after {count} batches, and the data gave only "
                    f"{index}",
                    fix="resume with the data set that the run had",
                )
            self.read += 1
        self.consumed, self.skipped = self.read, count

    def _next(self) -> Batch | None:
        if self.held:
            return self.held.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._marks and self.read - self._marks[-1][0] >= MARK_EVERY:
            self._mark()
        item = next(self._iterator, END)
        if item is END:
            self._mark(at_end=True)
            return None
        batch = as_batch(item, f"batch {self.read} of the data", self._like)
        self._like = batch.signature
        self.read += 1
        return batch

    def sample(self) -> Batch | None:
        """The next batch, which stays."""
        if not self.held:
            batch = self._next()
            if batch is not None:
                self.held.append(batch)
        return self.held[0] if self.held else None

    def more(self) -> bool:
        """Whether there is another batch; reads it, if that is not known."""
        return self.sample() is not None

    def fill(self, limit: int, maker: Maker, request: Fill) -> Stack | None:
        """The next batches of one signature, at most ``limit``; None where there are none."""
        if not self.held:
            self._mark()
        first = self._next()
        if first is None:
            return None
        whole = maker.rows == 1 or not all(map(on_host, jax.tree.leaves(first.value)))
        arrays = [] if whole else maker.borrow(first.signature)
        keep = whole or self.one_shot
        batches: list[Batch] = []
        count = 0
        try:
            for batch in itertools.chain([first], self._following(first, limit, request)):
                if not whole:
                    _write(arrays, count, batch)
                if keep:
                    batches.append(batch)
                count += 1
        except KeyboardInterrupt:
            self.held.extendleft(reversed(batches))  # nobody else could give them again
            raise
        if whole:
            stack = maker.stack_of(batches)
        else:
            value = jax.tree.unflatten(first.signature.tree, arrays)
            stack = maker.stack(first.signature, arrays, value, count, first.signature)
        stack.kept = tuple(batches) if self.one_shot else ()
        return stack

    def _following(self, first: Batch, limit: int, request: Fill) -> Iterator[Batch]:
        """The batches after ``first`` that belong to the same stack."""
        for _ in range(limit - 1):
            if request.late():
                return
            try:
                batch = self._next()
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # it is raised where it belongs: after these batches
                self._error = error
                return
            if batch is None:
                return
            if batch.signature is not first.signature and batch.signature != first.signature:
                self.held.appendleft(batch)
                return
            yield batch


def _write(arrays: list[np.ndarray[Any, Any]], row: int, batch: Batch) -> None:
    for array, leaf in zip(arrays, jax.tree.leaves(batch.value), strict=True):
        array[row] = leaf


class Serving:
    """A position in `Batches`: two integers."""

    def __init__(self, batches: Batches, epoch: int, index: int) -> None:
        self.epoch, self.read, self.consumed = epoch, index, index
        self.length = len(batches)
        self.batches = batches
        self._order: Any = END

    def more(self) -> bool:
        """Whether there is another batch."""
        return self.read < self.length

    def sample(self) -> Batch | None:
        """The next batch, which stays."""
        for value in self.batches.epoch(self.epoch, self.read):
            return as_batch(value, f"batch {self.read} of the data")
        return None

    def fill(self, limit: int, maker: Maker, request: Fill) -> Stack | None:
        """As of an iterator, by one gather."""
        del request  # it does not have to wait for anything
        batches, index, size = self.batches, self.read, self.batches.batch_size
        if index >= len(batches):
            return None
        if self._order is END:
            self._order = batches.order(self.epoch)
        full = len(batches) if batches.pad else batches.num_examples // size
        if index < full and batches.device:
            self.read = full
            return self._gathered(index, full - index, maker)
        # The last batch, if it is not full, has a shape of its own.
        count = min(limit, full - index) if index < full else 1
        self.read = index + count
        low = index * size
        size = size if index < full else batches.num_examples - low
        where = batches.examples(self._order, low, low + count * size)
        leaves, tree = jax.tree.flatten(batches.arrays)
        rows = Signature(tree, tuple(((size, *a.shape[1:]), a.dtype) for a in leaves))
        arrays = maker.borrow(rows)
        for buffer, leaf in zip(arrays, leaves, strict=True):
            filled = buffer.reshape(-1, *leaf.shape[1:])[: count * size]
            if isinstance(where, slice):
                filled[:] = leaf[where]
            else:
                np.take(leaf, where, axis=0, out=filled, mode="clip")  # "raise" copies twice
        value = jax.tree.unflatten(tree, arrays)
        signature = rows
        if batches.pad:
            mask = np.zeros((len(arrays[0]), size), bool)
            places = np.arange(low, low + count * size)
            mask.reshape(-1)[: count * size] = places < batches.num_examples
            if isinstance(value, tuple | list) and len(value) == 3:
                value[2][count:] = 0  # the rest holds anything, and is multiplied too
            value = marked(value, mask)
            marked_leaves, marked_tree = jax.tree.flatten(value)
            shapes = tuple((a.shape[1:], a.dtype) for a in marked_leaves)
            signature = Signature(marked_tree, shapes)
        return maker.stack(rows, arrays, value, count, signature)

    def _gathered(self, index: int, count: int, maker: Maker) -> Stack:
        batches = self.batches
        order = None if self._order is None else maker.place(self._order.astype(np.int32))
        sample = as_batch(next(batches.epoch(self.epoch, index)), "the data")
        source = Gathered(
            maker.put_once(batches), order, batches.batch_size, batches.num_examples, batches.pad
        )
        return Stack(source, count, sample.signature, index)


Cursor = Iterating | Serving
