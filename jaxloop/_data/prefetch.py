"""The feed: reads any kind of data set ahead of the device, and knows what was consumed.

    with Feed(data, epochs=2, iterations=None) as feed:
        feed.open(0, skip=0)
        sample = feed.sample()
        feed.configure(64, placement(state), numbers={})
        while feed.more():
            window = feed.read(10, 64, late)    # a block of at most ten batches
            feed.ahead(64)                      # meanwhile a thread prepares what follows
            window = feed.take(10)

Batches are stacked, each copied once, into a buffer of so many rows, and consumed through
windows of it: where a block ends has nothing to do with where a stack ends. A buffer is used again
once the blocks that read it are done, because a device may read the very memory of the host.
What was prepared and not consumed counts as unread.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxloop._core.batch import Batch, Signature
from jaxloop._core.interrupts import Signals
from jaxloop._core.placement import Placement
from jaxloop._data.device_rows import Single
from jaxloop._data.in_memory import Batches
from jaxloop._data.position import NOWHERE, Position, Unread, check_settings, settings_of, stateful
from jaxloop._data.readers import Cursor, Fill, Iterating, Late, Serving
from jaxloop._data.superbatch import Maker, Stack
from jaxloop.errors import ArgumentError, ArgumentTypeError, DataError

PATIENCE_S = 0.02
"""How long a block may wait to become full; then it runs with the batches that are there."""


POLL_S = 0.1
"""How often a wait for slow data wakes up, so that an interrupt gets through."""


KEPT = (
    "use data whose position can be kept: a re-iterable (a list, jl.batches), a function epoch -> "
    "iterable, or an iterator with get_state and set_state (Grain's)"
)


_NO_BATCH = Batch(None, Signature(None, ()))


class Window(NamedTuple):
    """A part of a stack: the batches of one block.

    ``start`` and ``bound`` are int32 scalars on the device, the first row and the number of rows.
    """

    source: Any
    start: Any
    bound: Any
    length: int
    signature: Signature
    stack: Stack | None

    def reading(self, marker: Any) -> None:
        """Says when the device will have read this window: when ``marker`` is ready."""
        if self.stack is not None:
            self.stack.marker = marker


class Feed:
    """Reads any kind of data set, ahead of the device, and knows what was consumed."""

    def __init__(
        self,
        data: Any,
        *,
        epochs: int,
        iterations: int | None,
        signals: Signals | None = None,
    ) -> None:
        self.data, self.epochs, self.iterations = data, epochs, iterations
        self._signals = signals or Signals()
        self.one_shot = data is not None and hasattr(data, "__next__")
        if data is None:
            if iterations is None:
                raise ArgumentError(
                    "run: data=None needs iterations=, the number of steps in an epoch",
                    fix="pass for example iterations=100, or pass data",
                )
        elif self.one_shot:
            if epochs > 1 and iterations is None:
                raise ArgumentError(
                    "run: a one-shot iterator cannot tell where an epoch ends, and several epochs "
                    "need iterations=",
                    fix="pass iterations=, or a re-iterable, or a function epoch -> iterable",
                )
        elif isinstance(data, str | bytes) or not (hasattr(data, "__iter__") or callable(data)):
            raise ArgumentTypeError(
                f"run: data must be an iterable of batches, a function epoch -> iterable, or None, "
                f"and is {type(data).__name__}",
                fix="for arrays in memory use jl.batches((x, y), batch_size)",
            )
        self._maker = Maker(1, Placement())
        self._cursor: Cursor = self._one_shot() if self.one_shot else Iterating(iter(()), 0, False)
        self._upcoming: Cursor | None = None
        self._open_epoch: int | None = None
        self._consumed = 0
        self._stack: Stack | None = None
        self._coming: Fill | None = None
        self._numbers: dict[int, Any] = {}
        self._queue: queue.SimpleQueue[Fill | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def configure(self, rows: int, place: Placement, numbers: dict[Any, Any]) -> None:
        """Says how many batches a stack may hold and where arrays belong.

        ``numbers`` remembers scalars that are on a device; it may outlive the feed.
        """
        self._maker = Maker(rows, place)
        self._numbers = numbers.setdefault(place, {})

    @property
    def keeps_position(self) -> bool:
        """Whether another process could go on where this one is."""
        return not self.one_shot or stateful(self.data) is not None

    @property
    def num_skipped(self) -> int:
        """How many batches were read again, and past, to go on where an earlier run was."""
        return self._cursor.skipped if isinstance(self._cursor, Iterating) else 0

    @property
    def num_read(self) -> int:
        """How many batches were read of the iterator or the epoch, consumed or not."""
        return self._cursor.read

    # --- positions -----------------------------------------------------------------------------

    def _one_shot(self) -> Iterating:
        return Iterating(self.data, 0, one_shot=True, own=stateful(self.data))

    def _cursor_at(self, epoch: int, skip: int, position: Position) -> Cursor:
        data = self.data
        if not isinstance(data, Batches) and not hasattr(data, "__iter__"):
            data = data(epoch)
        if isinstance(data, Batches):
            if skip:
                check_settings(position, data, epoch)
            return Serving(data, epoch, skip)
        loader = None if hasattr(data, "__next__") else stateful(data)
        known = position.state is not None
        again = skip
        if loader is not None and known:
            # A loader's own state is set before it is iterated over, an iterator's after.
            loader.set(position.state)
            again = position.skip
            if not skip and not position.at_end:
                # An epoch that was not read to its end: it was begun, and left where it was.
                Iterating(iter(data), epoch, one_shot=False).skip(again, self._signals.poll)
                again = 0
        iterator = iter(data)
        own = loader or stateful(iterator)
        if own is not None and loader is None and known and skip:
            own.set(position.state)
            again = position.skip
        cursor = Iterating(iterator, epoch, one_shot=False, own=own, read=skip - again)
        with contextlib.suppress(TypeError):  # not sized, or of a length that is not known
            cursor.length = len(data)
        cursor.skip(again, self._signals.poll)
        return cursor

    def open(self, epoch: int, skip: int, position: Position = NOWHERE) -> int | None:
        """Makes ready for an epoch, ``skip`` batches of which were consumed before.

        Args:
            epoch: The epoch.
            skip: So many batches of it are not wanted again.
            position: Where an earlier run was.

        Returns:
            The number of its batches, or None if that is not known.

        Raises:
            DataError: The data cannot be put where the earlier run was.
        """
        if self.data is None:
            return self.iterations
        if self.one_shot:
            self._consumed = skip
            self._go_on(position, skip)
        elif self._open_epoch != epoch or skip or self._consumed:
            self._consumed = skip
            if self._upcoming is not None and self._upcoming.epoch == epoch and not skip:
                self._cursor, self._upcoming = self._upcoming, None
            else:
                self._forget()
                with self._signals.reading:
                    self._cursor = self._cursor_at(epoch, skip, position)
        self._open_epoch = epoch
        length = self._cursor.length
        if self.iterations is not None:
            length = self.iterations if length is None else min(length, self.iterations)
        return length

    def _go_on(self, position: Position, skip: int) -> None:
        """Puts a one-shot iterator where an earlier run was."""
        own = stateful(self.data)
        if own is not None and position.state is not None:
            own.set(position.state)
            self._cursor = cursor = self._one_shot()
            cursor.skip(position.skip, self._signals.poll)
        elif position.unread is not None:
            if position.unread.source is self.data and isinstance(self._cursor, Iterating):
                self._cursor.held = collections.deque(position.unread.batches())
        elif position.one_shot or skip:
            raise DataError(
                "where a one-shot iterator has to go on is known to the process alone that read "
                f"it, and the state to go on from has consumed {skip} batches of this epoch",
                fix=KEPT,
            )

    def close_epoch(self) -> None:
        """Ends an epoch: a re-iterable starts anew, a one-shot iterator just continues."""
        self._open_epoch = None
        if self._upcoming is None:
            self._forget()
        else:
            self._stack = None  # what is coming belongs to the next epoch

    def _forget(self) -> None:
        """Drops what was prepared; a one-shot iterator gets its batches back."""
        unread = self._unread(self._coming) if self.one_shot else []
        if self._coming is not None:
            self._wait(self._coming, patience_s=0.0)
        self._stack = self._coming = self._upcoming = None
        if isinstance(self._cursor, Iterating) and self.one_shot:
            self._cursor.held = collections.deque(unread)

    def _unread(self, coming: Fill | None) -> list[Batch]:
        """The batches that were read and not consumed, in order."""
        stack, cursor = self._stack, self._cursor
        assert isinstance(cursor, Iterating)
        batches = [] if stack is None else list(stack.kept[stack.taken :])
        if coming is not None:
            self._wait(coming, patience_s=0.0)
            if coming.stack is not None:
                batches += coming.stack.kept
        return [*batches, *cursor.held]

    @property
    def position(self) -> Position:
        """Where the run is in its data: after what was consumed, whatever was read."""
        cursor = self._cursor
        if isinstance(cursor, Serving):
            return Position(settings=settings_of(cursor.batches))
        skip, state, at_end = cursor.mark()
        if not self.one_shot:
            return NOWHERE if state is None else Position(False, state, skip, at_end)
        coming = self._coming
        if coming is None or not self._signals.name:
            known = self._unread(coming)
            unread = Unread(self.data, lambda: known)
        else:
            # The run ends here, maybe because its data are slow: whoever goes on may wait for them.
            unread = Unread(self.data, lambda: self._unread(coming))
        return Position(True, state, skip, unread=unread)

    # --- reading -------------------------------------------------------------------------------

    def sample(self) -> Batch | None:
        """The next batch, which stays; None where the data end."""
        if self.data is None:
            return _NO_BATCH
        with self._signals.reading:
            return self._cursor.sample()

    def more(self) -> bool:
        """Whether the epoch has another batch; where nothing is prepared, it reads one."""
        if self.data is None or self.prepared:
            return True
        if self._coming is not None and self._upcoming is None:
            return self._receive()
        with self._signals.reading:
            return self._cursor.more()

    def read(self, limit: int, most: int, late: Late) -> Window:
        """As `take`, where nothing is prepared: reads it here and now.

        Args:
            limit: The most that the block may have.
            most: The most to read, from ``limit`` on.
            late: Asked between batches: whether those that are there must do.
        """
        if self.data is not None:
            self._coming = Fill(self._cursor, self._within(most), self._maker, late)
            with self._signals.reading:
                self._coming.run()
            self._receive()
        return self.take(limit)

    def take(self, limit: int) -> Window:
        """Up to ``limit`` batches of one signature, of those that are prepared."""
        if self.data is None:
            numbers = self.number(0), self.number(limit)
            return Window(Single(None), *numbers, limit, _NO_BATCH.signature, None)
        stack = self._stack
        assert stack is not None
        count = min(limit, stack.left)
        row = stack.first + stack.taken
        stack.marker = None  # first: the thread may ask at any time whether it is done
        stack.taken += count
        self._consumed += count
        self._cursor.consumed += count
        numbers = self.number(row), self.number(count)
        return Window(stack.source, *numbers, count, stack.signature, stack)

    @property
    def idle(self) -> bool:
        """Whether nothing is being prepared that could be."""
        return self._coming is None and self.data is not None

    @property
    def prepared(self) -> int:
        """How many batches are ready to be taken."""
        return 0 if self._stack is None else self._stack.left

    def ahead(self, most: int) -> None:
        """Lets the thread prepare what follows: at most so many batches."""
        if most < 1 or not self.idle:
            return
        cursor, limit = self._cursor, self._within(most)
        if limit < 1 or (cursor.length is not None and cursor.read >= cursor.length):
            epoch = cursor.epoch + 1
            if not isinstance(self.data, Batches) or epoch >= self.epochs:
                return
            # An order is a function of (seed, epoch), so the next epoch's can be known now.
            cursor = self._upcoming = Serving(self.data, epoch, 0)
            limit = most if self.iterations is None else min(most, self.iterations)
        self._coming = Fill(cursor, limit, self._maker, None)
        self._submit(self._coming)

    def _within(self, most: int) -> int:
        """So many batches, or as many as this epoch still wants."""
        most = min(most, self._maker.rows)
        if self.iterations is None:
            return most
        return min(most, self.iterations - self._consumed - self.prepared)

    def number(self, value: int) -> Any:
        """An int32 scalar on the device; put there once."""
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = self._maker.place(np.int32(value))
        return number

    # --- the thread ----------------------------------------------------------------------------

    def _submit(self, fill: Fill) -> None:
        if self._thread is None:
            # JAX keeps some of its settings by thread: this one is to read as its owner would.
            names = ("jax_enable_x64", "jax_default_device")
            arguments = (self._queue, *(getattr(jax.config, name) for name in names))
            self._thread = threading.Thread(
                target=_work, args=arguments, name="jaxloop-feed", daemon=True
            )
            self._thread.start()
        self._queue.put(fill)

    def _wait(self, fill: Fill, patience_s: float) -> None:
        if fill.done.is_set() or fill.done.wait(patience_s):
            return
        fill.hurry()
        while not fill.done.wait(POLL_S):
            self._signals.poll()

    def _receive(self) -> bool:
        """Takes over the stack that is coming; whether there is one."""
        fill = self._coming
        assert fill is not None
        self._wait(fill, PATIENCE_S)
        self._coming = None
        if fill.error is not None:
            raise fill.error
        if fill.stack is None:
            return False
        self._stack = fill.stack
        return True

    def close(self) -> None:
        """Ends the thread, after the batch that it is reading; a signal does not wait for that."""
        thread, self._thread = self._thread, None
        if thread is not None:
            if self._coming is not None:
                self._coming.hurry()
            self._queue.put(None)
            thread.join(POLL_S)
            while thread.is_alive() and not (self._signals.name and self._coming):
                thread.join(POLL_S)


def _work(fills: queue.SimpleQueue[Fill | None], x64: bool, device: Any) -> None:
    with jax.enable_x64(x64), jax.default_device(device):
        for fill in iter(fills.get, None):
            assert fill is not None
            fill.run()
