"""Readers, which hold a position in a data set and fill the next superbatch from there.

    reader = IteratorReader(iter(data), epoch=0, one_shot=False)
    fill = Fill(reader, limit=64, pool=pool, late=None)
    fill.run()                              # here, or in a thread
    fill.superbatch, fill.error

If the data raise an error, it is raised in order: after the superbatch of the preceding batches.
"""

from __future__ import annotations

import collections
import itertools
import queue
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import jax
import numpy as np

from jaxloop._core.batch import Batch, Signature, as_batch, describe_leaves
from jaxloop._data.position import Position, Stateful
from jaxloop._data.superbatch import BufferPool, Superbatch, is_on_host
from jaxloop.errors import DataError

Late = Callable[[], bool]
"""Called between batches. Returns whether a superbatch must end with the batches it has."""

_END: Final = object()

_STATE_EVERY = 64
"""A run that resumes between two states of an iterator rereads at most this many batches."""


class Fills(Protocol):
    """A reader, as far as a request to fill a superbatch needs it."""

    def fill(self, request: Fill) -> Superbatch | None:
        """Returns the next batches of one signature, or None at the end of the data."""


class Fill:
    """A request to fill a superbatch, possibly in the thread.

    Attributes:
        superbatch: The result, or None if no batch was left.
        error: The error that the data raised, or None.
        finished: Whether it has run.
        done: Gets an item when it has run in the thread, for another thread that waits.
    """

    __slots__ = ("done", "error", "finished", "late", "limit", "pool", "reader", "superbatch")

    def __init__(self, reader: Fills, limit: int, pool: BufferPool, late: Late | None) -> None:
        self.reader, self.limit, self.pool = reader, limit, pool
        self.finished = False
        self.done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.late: Late = late or _never
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


def _never() -> bool:
    return False


def _always() -> bool:
    return True


class IteratorReader:
    """A position in an iterator.

    Args:
        iterator: The iterator to read.
        epoch: Its epoch.
        one_shot: Whether it continues across epochs.
        own: The access to its own state, if it has one.
        num_read: The number of its batches that were read before.
    """

    def __init__(
        self,
        iterator: Iterator[Any],
        epoch: int,
        one_shot: bool,
        own: Stateful | None = None,
        num_read: int = 0,
    ) -> None:
        self.epoch, self.one_shot = epoch, one_shot
        self.length: int | None = None
        self.num_read = self.num_consumed = num_read
        self.num_skipped = 0
        self.first_batch: str | None = None
        self.held: collections.deque[Batch] = collections.deque()
        self._iterator, self._own = iterator, own
        # (batches read by then, the iterator's own state, whether it was at its end)
        self._states: list[tuple[int, Any, bool]] = []
        self._error: BaseException | None = None
        self._like: Signature | None = None
        self._position: Position | None = None
        self._keep_state()

    def _keep_state(self, at_end: bool = False) -> None:
        if self._own is None:
            return
        # States before the last one that was consumed are not needed. The list is never changed in
        # place, because the thread adds states while the engine reads them.
        behind = sum(state[0] <= self.num_consumed for state in self._states)
        kept = self._states[max(0, behind - 1) :]
        self._states = [*kept, (self.num_read, self._own.get(), at_end)]

    def consumed_state(self) -> tuple[int, Any, bool]:
        """Returns ``(skip, state, at_end)``; the next batch is ``skip`` batches after the state."""
        known = [state for state in self._states if state[0] <= self.num_consumed]
        at, state, at_end = known[-1] if known else (self.num_consumed, None, False)
        return self.num_consumed - at, state, at_end

    def position(self) -> Position:
        """Returns the position after the last consumed batch of a re-iterable."""
        skip, state, at_end = self.consumed_state()
        if state is not None:
            return Position(False, state, skip, at_end, self.settings)
        if self._position is None or self._position.settings["first_batch"] is None:
            self._position = Position(settings=self.settings)
        return self._position

    @property
    def settings(self) -> dict[str, Any]:
        """What is known of the data; see `Position`."""
        if self.one_shot:
            return {"kind": "a one-shot iterator"}
        return {
            "kind": "an iterable",
            "length": self.length,
            "first_batch": self.first_batch,
        }

    def _see_first(self, batch: Batch) -> None:
        self.first_batch = describe_leaves(*batch.signature)

    def skip(self, count: int, poll: Callable[[], None]) -> None:
        """Skips ``count`` batches that were consumed in an earlier run, by reading them."""
        total = self.num_read + count
        for _ in range(count):
            poll()  # this may take long
            item = next(self._iterator, _END)
            if item is _END:
                raise DataError(
                    f"the data of epoch {self.epoch} must have at least {total} batches to resume, "
                    f"got {self.num_read}",
                    fix="resume with the data of the earlier run",
                )
            if not self.num_read:
                self._see_first(as_batch(item, "batch 0 of the data"))
            self.num_read += 1
        self.num_consumed, self.num_skipped = self.num_read, self.num_skipped + count

    def _next(self) -> Batch | None:
        if self.held:
            return self.held.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._states and self.num_read - self._states[-1][0] >= _STATE_EVERY:
            self._keep_state()
        item = next(self._iterator, _END)
        if item is _END:
            self._keep_state(at_end=True)
            return None
        batch = as_batch(item, f"batch {self.num_read} of the data", self._like)
        if not self.num_read:
            self._see_first(batch)
        self._like = batch.signature
        self.num_read += 1
        return batch

    def sample(self) -> Batch | None:
        """Returns the next batch without consuming it, or None at the end of the data."""
        if not self.held:
            batch = self._next()
            if batch is not None:
                self.held.append(batch)
        return self.held[0] if self.held else None

    def has_more(self) -> bool:
        """Returns whether another batch follows. This may read one."""
        return self.sample() is not None

    def fill(self, request: Fill) -> Superbatch | None:
        """Returns the next batches of one signature, or None at the end of the data."""
        if not self.held:
            self._keep_state()
        first = self._next()
        if first is None:
            return None
        pool = request.pool
        whole = pool.num_rows == 1 or not all(map(is_on_host, jax.tree.leaves(first.value)))
        arrays = [] if whole else pool.borrow(first.signature)
        keep = whole or self.one_shot
        batches: list[Batch] = []
        count = 0
        try:
            for batch in itertools.chain([first], self._following(first, request)):
                if not whole:
                    _write(arrays, count, batch)
                if keep:
                    batches.append(batch)
                count += 1
        except KeyboardInterrupt:
            self.held.extendleft(reversed(batches))  # the iterator cannot return them again
            raise
        if whole:
            superbatch = pool.superbatch_of(batches)
        else:
            value = jax.tree.unflatten(first.signature.tree, arrays)
            superbatch = pool.superbatch(first.signature, arrays, value, count, first.signature)
        superbatch.kept = tuple(batches) if self.one_shot else ()
        return superbatch

    def _following(self, first: Batch, request: Fill) -> Iterator[Batch]:
        """Yields the batches after ``first`` that belong in the same superbatch."""
        for _ in range(request.limit - 1):
            if request.late():
                return
            try:
                batch = self._next()
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # raised later, after these batches
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
