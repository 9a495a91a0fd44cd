"""The reader of an iterator of batches.

    reader = IteratorReader(iter(data), epoch=0, one_shot=False)
    reader.sample()                         # the next batch, which is not consumed
    reader.fill(request)                    # a superbatch of the next batches

If the data raise an error, it is raised in order: after the superbatch of the preceding batches.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import jax
import numpy as np

from jaxloop._core.batch import Batch, Signature, as_batch, describe_leaves
from jaxloop._data.position import Position, Stateful
from jaxloop._data.rows import NOTHING, RowCopier, Target, only_next
from jaxloop._data.superbatch import Superbatch, batches_in, is_on_host
from jaxloop.errors import DataError

if TYPE_CHECKING:
    from jaxloop._data.readers import Fill

_END: Final = object()

_STATE_EVERY = 64
"""A run that resumes between two states of an iterator rereads at most this many batches."""


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
        self._iterator, self._own = only_next(iterator), own
        # (batches read by then, the iterator's own state, whether it was at its end)
        self._states: list[tuple[int, Any, bool]] = []
        self._error: BaseException | None = None
        self._like: Signature | None = None
        self._position: Position | None = None
        self._copier: RowCopier | None = None
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
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._states and self.num_read - self._states[-1][0] >= _STATE_EVERY:
            self._keep_state()
        # A signal's exception may arrive after a call of `next`, but not where a loop begins.
        for item in self._iterator:
            try:
                return self._converted(item)
            except KeyboardInterrupt:
                self.held.append(self._converted(item))
                raise
        self._keep_state(at_end=True)
        return None

    def _converted(self, item: Any) -> Batch:
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
        first = self.sample()
        if first is None:
            return None
        pool, signature = request.pool, first.signature
        if not _fits_rows(first, pool.num_rows):
            return self._whole(request)
        arrays = pool.borrow(signature)
        copier = self._copier
        if copier is None or copier.signature is not signature:
            copier = self._copier = RowCopier(signature)
        copier.restart()
        try:
            self._read_rows(copier, pool.target(), request)
            value = jax.tree.unflatten(signature.tree, arrays)
            superbatch = pool.superbatch(signature, arrays, value, copier.count, signature)
            superbatch.source = arrays if self.one_shot else None
        except KeyboardInterrupt:
            self._read_again(copier, arrays)
            raise
        return superbatch

    def _read_rows(self, copier: RowCopier, to: Target, request: Fill) -> None:
        """Reads the next batches into rows, and keeps an error of the data for later."""
        try:
            self._read_alike(copier, to, request)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if not copier.count:
                raise
            self._error = error  # raised later, after these batches

    def _read_alike(self, copier: RowCopier, to: Target, request: Fill) -> None:
        """Reads the next batches into rows, until one has another signature."""
        held, signature = self.held, copier.signature
        while True:
            while held and copier.count < request.limit:
                if held[0].signature is not signature and held[0].signature != signature:
                    return
                copier.write(to, held[0])
                # A signal's exception arrives after calls, so a batch is either counted or held.
                copier.count += 1
                held.popleft()
                if request.late is not None and request.late():
                    return
            if copier.count >= request.limit:
                return
            self._copy_rows(copier, to, request)
            if copier.item is not NOTHING:
                item = copier.item
                batch = self._converted(item)
                copier.item = NOTHING
                held.append(batch)
                copier.learn(item, batch)
            elif copier.ended:
                self._keep_state(at_end=True)
                return
            elif copier.late:
                return

    def _copy_rows(self, copier: RowCopier, to: Target, request: Fill) -> None:
        """Reads batches that fit, up to the next state that is kept of the iterator."""
        stop, before = request.limit, copier.count
        if self._states:
            since = self.num_read - self._states[-1][0]
            if since >= _STATE_EVERY:
                self._keep_state()
                since = 0
            stop = min(stop, before + _STATE_EVERY - since)
        try:
            copier.copy(to, stop, self._iterator, request)
        finally:
            self.num_read += copier.count - before

    def _read_again(self, copier: RowCopier, arrays: list[np.ndarray[Any, Any]]) -> None:
        """Gives back what was read when a signal came. A one-shot iterator cannot return it."""
        if not self.one_shot:
            return
        batches = batches_in(arrays, copier.signature, 0, copier.count)
        if copier.item is not NOTHING:
            try:
                batches.append(self._converted(copier.item))
            except Exception as error:
                self._error = error
        self.held.extendleft(reversed(batches))

    def _whole(self, request: Fill) -> Superbatch:
        """Returns the next batches in one superbatch, without copying the arrays of JAX."""
        held, batches = self.held, [_kept(self.held[0])]
        signature = batches[0].signature
        try:
            held.popleft()
            while len(batches) < request.limit and not (request.late and request.late()):
                try:
                    batch = self.sample()
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # raised later, after these batches
                    self._error = error
                    break
                if batch is None or batch.signature != signature:
                    break
                batch = _kept(batch)
                batches = [*batches, batch]  # not a call, after which a signal may raise
                held.popleft()
            superbatch = request.pool.superbatch_of(batches)
        except KeyboardInterrupt:
            held.extendleft(reversed(batches))  # the iterator cannot return them again
            raise
        if not self.one_shot:
            superbatch.source = None
        return superbatch


def _kept(batch: Batch) -> Batch:
    """Returns a batch with copies of its NumPy arrays, which the data may reuse for the next."""
    copy = jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, batch.value)
    return Batch(copy, batch.signature)


def _fits_rows(batch: Batch, num_rows: int) -> bool:
    """Returns whether a batch can be copied to a row of a buffer on the host.

    If there is one row, an array of JAX is not copied. A NumPy array is: a device may read its
    memory directly, and the data may reuse it for the next batch.
    """
    leaves = jax.tree.leaves(batch.value)
    if num_rows == 1 and any(isinstance(leaf, jax.Array) for leaf in leaves):
        return False
    return all(map(is_on_host, leaves))
