"""The prefetcher, which reads ahead of the device and tracks which batches were consumed.

    with Prefetcher(source) as prefetcher:
        prefetcher.open(epoch=0, step=0)
        prefetcher.configure(64, placement(state), Reusable())
        while prefetcher.num_ready or prefetcher.has_more():
            if not prefetcher.num_ready:
                prefetcher.read(64, late)
            window = prefetcher.take(10)        # a block of at most ten batches
            prefetcher.ahead(64)                # meanwhile a thread prepares the next ones

Each batch is copied once, into a superbatch, and blocks consume windows of it. Block boundaries are
therefore independent of superbatch boundaries. Batches that were prepared but not consumed count as
unread.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxloop._core.batch import Batch
from jaxloop._core.bounds import limited
from jaxloop._core.placement import Placement
from jaxloop._core.types import PyTree
from jaxloop._data.array_reader import ArrayReader
from jaxloop._data.device_rows import Single
from jaxloop._data.iterator_reader import IteratorReader
from jaxloop._data.position import FROM_COUNTERS, NO_DATA, Position, Unread
from jaxloop._data.readers import Fill, Late
from jaxloop._data.source import NO_BATCH, DataSource
from jaxloop._data.superbatch import BufferPool, KeptBuffers, Superbatch

PATIENCE_S = 0.02
"""How long a block may wait to become full. After that it runs with the batches that are ready."""
_POLL_S = 0.1
"""How often a wait for slow data wakes up to check for an interrupt."""
_SETTINGS = ("jax_enable_x64", "jax_default_device")
_THREAD_NAME = "jaxloop-prefetch"


class Window:
    """A part of a superbatch: the batches of one block.

    Attributes:
        rows: The rows that the block reads from.
        start: The first row, an int32 scalar on the device.
        bound: The number of rows, an int32 scalar on the device.
        length: The number of rows.
        superbatch: The superbatch that contains the window. Set its marker to an array that is
            ready when the device has read the window.
    """

    __slots__ = ("bound", "length", "rows", "start", "superbatch")

    def __init__(self, superbatch: Superbatch, start: Any, bound: Any, length: int) -> None:
        self.superbatch, self.rows = superbatch, superbatch.rows
        self.start, self.bound, self.length = start, bound, length


class Numbers(dict[int, Any]):
    """Int32 scalars on the device by value. Each is transferred once, when it is first read.

    Args:
        place: Their placement.
    """

    def __init__(self, place: Placement) -> None:
        super().__init__()
        self._place = place

    def __missing__(self, value: int) -> Any:
        number = self[value] = self._place(np.int32(value))
        return number


@dataclasses.dataclass(frozen=True, eq=False)
class Reusable:
    """What a run leaves to the next run of the same program.

    Attributes:
        numbers: Scalars on the device, by placement.
        buffers: Memory for superbatches.
    """

    numbers: dict[Placement, Numbers] = dataclasses.field(default_factory=dict)
    buffers: KeptBuffers = dataclasses.field(default_factory=dict)


class Prefetcher:
    """A reader that works ahead of the device.

    Args:
        source: The user's data.

    Attributes:
        num_ready: The number of batches that can be taken.
        numbers: Scalars on the device.
        idle: Whether the thread has nothing to do and could prepare more data.
        limit: How many iterations the open epoch may have, or None.
    """

    def __init__(self, source: DataSource) -> None:
        self.source = source
        self.num_ready = 0
        self.idle = False
        self.limit: int | None = None
        self._interrupts = source.interrupts
        self._pool = BufferPool(1, Placement())
        self.numbers = Numbers(Placement())
        self._superbatch: Superbatch | None = None
        self._pending: Fill | None = None
        self._next_epoch: ArrayReader | None = None
        self._open_epoch: int | None = None
        self._num_consumed = self._first_step = 0
        self._worker = _Worker()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def configure(self, num_rows: int, place: Placement, reusable: Reusable) -> None:
        """Sets the size of a superbatch and the placement of arrays.

        Args:
            num_rows: The maximum number of batches in a superbatch.
            place: The placement of arrays.
            reusable: What earlier runs left, and what this one leaves.
        """
        self._pool = BufferPool(num_rows, place, reusable.buffers)
        self.numbers = reusable.numbers.setdefault(place, Numbers(place))

    # --- epochs and positions ------------------------------------------------------------------

    def open(
        self, epoch: int, step: int, skip: int = 0, position: Position = FROM_COUNTERS
    ) -> int | None:
        """Opens an epoch after ``skip`` batches that were consumed in an earlier run.

        Args:
            epoch: Its number.
            step: The number of steps before it.
            position: The position of the earlier run.

        Returns:
            The number of its iterations, or None if that is unknown.

        Raises:
            DataError: The data cannot be restored to the position of the earlier run.
        """
        source = self.source
        if source.one_shot:
            source.open(epoch, skip, position)
        elif source.data is not None and (self._open_epoch != epoch or skip or self._num_consumed):
            if self._next_epoch is not None and self._next_epoch.epoch == epoch and not skip:
                source.reader, self._next_epoch = self._next_epoch, None
            else:
                self._forget()
                source.open(epoch, skip, position)
        self._open_epoch, self._num_consumed, self._first_step = epoch, skip, step
        self.limit = source.bounds.of_epoch(step)
        self.idle = self._pending is None and source.data is not None
        return source.length(self.limit)

    def close_epoch(self) -> None:
        """Ends an epoch. A re-iterable starts over, and a one-shot iterator continues."""
        self._open_epoch = None
        if self._next_epoch is None:
            self._forget()
        else:
            self._use(None)  # what is pending belongs to the next epoch

    def _use(self, superbatch: Superbatch | None) -> None:
        self._superbatch = superbatch
        self.num_ready = 0 if superbatch is None else superbatch.num_left

    def _forget(self) -> None:
        """Drops the prepared batches. Those of a one-shot iterator are kept for the next read."""
        pending = self._pending
        unread = self._unread(pending) if self.source.one_shot else []
        if pending is not None:
            self._wait(pending, patience_s=0.0)
        self._use(None)
        self._pending = self._next_epoch = None
        if self.source.one_shot:
            self.source.give_back(unread)

    def _unread(self, pending: Fill | None) -> list[Batch]:
        """Returns the batches that were read but not consumed, in order."""
        superbatch, reader = self._superbatch, self.source.reader
        assert isinstance(reader, IteratorReader)
        batches: list[Batch] = []
        if superbatch is not None:
            batches += superbatch.unread()
        if pending is not None:
            self._wait(pending, patience_s=0.0)
            if pending.superbatch is not None:
                batches += pending.superbatch.unread()
        return [*batches, *reader.held]

    def position(self) -> Position:
        """Returns the position after the last consumed batch, regardless of reading ahead."""
        reader = self.source.reader
        if self.source.data is None:
            return NO_DATA
        if isinstance(reader, ArrayReader) or not self.source.one_shot:
            return reader.position()
        skip, state, _ = reader.consumed_state()
        pending = self._pending
        if pending is None or self._interrupts.flag.name is None:
            known = self._unread(pending)
            unread = Unread(self.source.data, lambda: known)
        else:
            # A signal ends the run, perhaps because the data are slow. A resumed run may wait.
            unread = Unread(self.source.data, lambda: self._unread(pending))
        return Position(True, state, skip, settings=reader.settings, unread=unread)

    # --- reading -------------------------------------------------------------------------------

    def has_more(self) -> bool:
        """Returns whether the epoch has another batch. If none is ready, this reads one."""
        if self.source.data is None or self.num_ready:
            return True
        if self._pending is not None and self._next_epoch is None:
            return self._receive(self._pending)
        with self._interrupts.waiting:
            return self.source.reader.has_more()

    def read(self, most: int, late: Late) -> None:
        """Prepares a superbatch in this thread, because none is ready.

        Args:
            most: The maximum number of batches to read.
            late: Called between batches. Returns whether to stop with the batches read so far.
        """
        if self.source.data is None:
            return
        fill = Fill(self.source.reader, self._within(most), self._pool, late)
        with self._interrupts.waiting:  # may raise, before anything was read
            self._pending = fill
            fill.run()
        self._receive(fill)

    def peek(self) -> PyTree:
        """Returns the next batch without consuming it, after `has_more` has returned True."""
        if self._superbatch is not None and self.num_ready:
            return self._superbatch.peek()
        sample = self.source.sample()
        return None if sample is None else sample.value

    def take(self, limit: int) -> Window:
        """Returns up to ``limit`` of the batches that are ready, all of one signature."""
        superbatch = self._superbatch
        if superbatch is None:
            assert self.source.data is None  # a step without data
            nothing = Superbatch(Single(None), limit, NO_BATCH.signature)
            return Window(nothing, self.numbers[0], self.numbers[limit], limit)
        count = min(limit, superbatch.num_left)
        row = superbatch.next_row
        superbatch.marker = None  # set first, because the thread may call `is_done` at any time
        superbatch.next_row = row + count
        superbatch.num_left = self.num_ready = superbatch.num_left - count
        self._num_consumed += count
        self.source.reader.num_consumed += count
        return Window(superbatch, self.numbers[row], self.numbers[count], count)

    def ahead(self, most: int) -> None:
        """Prepares at most ``most`` of the next batches, in the thread unless that is quick."""
        source = self.source
        reader, limit = source.reader, self._within(most)
        if limit < 1 or (reader.length is not None and reader.num_read >= reader.length):
            step = self._first_step + (source.length(self.limit) or 0)
            if (following := source.following(reader.epoch + 1, step)) is None:
                self.idle = False  # nothing is left in this epoch
                return
            reader = self._next_epoch = following
            limit = limited(most, source.bounds.of_epoch(step))
        fill = Fill(reader, limit, self._pool, None)
        self._pending, self.idle = fill, False
        if isinstance(reader, ArrayReader) and reader.is_quick:
            fill.run()
            return
        if self._worker.thread is None:
            self._worker.start()
        self._worker.fills.put(fill)

    def _within(self, most: int) -> int:
        """Returns ``most``, limited by the size of a superbatch and by what the epoch needs."""
        most = min(most, self._pool.num_rows)
        if self.limit is None:
            return most
        return min(most, self.limit - self._num_consumed - self.num_ready)

    def keep_buffers(self) -> None:
        """Leaves the buffers to the next run, when the device has finished this one."""
        if self._pending is None:  # else the thread may write to one
            self._pool.keep()

    # --- the thread ----------------------------------------------------------------------------

    def _wait(self, fill: Fill, patience_s: float) -> None:
        timeout_s = patience_s
        while not fill.finished:
            try:
                fill.done.get(timeout=timeout_s)
            except queue.Empty:
                if timeout_s == _POLL_S:
                    self._interrupts.poll()
                fill.hurry()
                timeout_s = _POLL_S

    def _receive(self, fill: Fill) -> bool:
        """Takes over the pending superbatch, and returns whether it has batches."""
        if not fill.finished:
            self._wait(fill, PATIENCE_S)
        self._pending, self.idle = None, True
        if fill.error is not None:
            raise fill.error
        if fill.superbatch is None:
            return False
        reader = self.source.reader
        if isinstance(reader, ArrayReader) and reader.batches.device:
            reader.begin(fill.superbatch, self._pool)
        self._superbatch = fill.superbatch
        self.num_ready = fill.superbatch.num_left
        return True

    def close(self) -> None:
        """Stops the thread after the batch it is reading. After a signal, it does not wait."""
        if self._pending is not None:
            self._pending.hurry()
        self._worker.stop(lambda: bool(self._interrupts.flag.name and self._pending))
        self.source.release()


class _Worker:
    """A thread that fills superbatches in order.

    Attributes:
        thread: The thread, or None if it was not started.
        fills: What it fills.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.fills: queue.SimpleQueue[Fill | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Starts the thread."""
        # JAX keeps some settings per thread. This thread must use those of the loop's thread.
        x64, device = (getattr(jax.config, name) for name in _SETTINGS)
        arguments = (self.fills, x64, device)
        self.thread = threading.Thread(target=_work, args=arguments, name=_THREAD_NAME, daemon=True)
        self.thread.start()

    def stop(self, leaves: Callable[[], bool]) -> None:
        """Stops the thread, and waits for it unless ``leaves`` returns True."""
        thread, self.thread = self.thread, None
        if thread is not None:
            self.fills.put(None)
            thread.join(_POLL_S)
            while thread.is_alive() and not leaves():
                thread.join(_POLL_S)


def _work(
    fills: queue.SimpleQueue[Fill | None],
    x64: bool,
    device: Any,
) -> None:
    with jax.enable_x64(x64), jax.default_device(device):
        for fill in iter(fills.get, None):
            assert fill is not None
            fill.run()
            fill.done.put(None)
