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
import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxloop.data import Batch, Batches, Signature, as_batch, marked
from jaxloop.errors import ArgumentError, ArgumentTypeError, DataError
from jaxloop.sources import Gathered, Single, Stacked

PyTree = Any
Late = Callable[[], bool]

PATIENCE_S = 0.02
"""How long a block may wait to become full; then it runs with the batches that are there."""
POLL_S = 0.1
"""How often a wait for slow data wakes up, so that an interrupt gets through."""
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


_END = object()
_NO_BATCH = Batch(None, Signature(None, ()))


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where arrays belong, given where the state is; a call puts a pytree there.

    Attributes:
        device: The one device of a state that is on one; arrays are put there uncommitted.
        sharding: Of a state that is spread over a mesh: arrays are replicated over it.
        known: Whether arrays are put anywhere before they are used.
    """

    device: Any = None
    sharding: Any = None
    known: bool = False

    def __call__(self, tree: PyTree) -> PyTree:
        if not self.known:
            return tree
        if self.sharding is not None:
            return jax.device_put(tree, self.sharding)
        with jax.default_device(self.device):
            return jax.device_put(tree)


def placement(state: PyTree) -> Placement:
    """Where the batches of a step belong, given the arrays that it carries."""
    shardings = {x.sharding for x in jax.tree.leaves(state) if isinstance(x, jax.Array)}
    devices = {device for sharding in shardings for device in sharding.device_set}
    if len(devices) == 1:
        return Placement(device=devices.pop(), known=True)
    meshes = {s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)}
    if len(meshes) == 1 and set(next(iter(meshes)).devices.flat) == devices:
        spec = jax.sharding.PartitionSpec()
        return Placement(sharding=jax.sharding.NamedSharding(meshes.pop(), spec), known=True)
    return Placement(known=not devices)


class _Maker:
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


def _on_host(leaf: Any) -> bool:
    """Whether a leaf can be copied by the host without asking another device."""
    if not isinstance(leaf, jax.Array):
        return True
    return not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) and (
        leaf.sharding.device_set == {jax.devices("cpu")[0]}
    )


class _Fill:
    """A stack that is being filled, maybe by the thread.

    Attributes:
        late: Asked between batches: whether the stack is to end with those that are there.
    """

    __slots__ = ("cursor", "done", "error", "late", "limit", "maker", "stack")

    def __init__(self, cursor: _Cursor, limit: int, maker: _Maker, late: Late | None) -> None:
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


class _Iterating:
    """A position in an iterator."""

    def __init__(self, iterator: Iterator[Any], epoch: int, one_shot: bool) -> None:
        self.epoch, self.one_shot = epoch, one_shot
        self.length: int | None = None
        self.read = 0
        self.held: collections.deque[Batch] = collections.deque()
        self._iterator = iterator
        self._error: BaseException | None = None
        self._like: Signature | None = None

    def skip(self, count: int) -> None:
        """Reads past ``count`` batches that were consumed in an earlier run."""
        for index in range(count):
            if next(self._iterator, _END) is _END:
                raise DataError(
                    f"epoch {self.epoch} goes on after {count} batches, and the data gave only "
                    f"{index}",
                    fix="resume with the data set that the run had",
                )

    def _next(self) -> Batch | None:
        if self.held:
            return self.held.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        item = next(self._iterator, _END)
        if item is _END:
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

    def fill(self, limit: int, maker: _Maker, request: _Fill) -> Stack | None:
        """The next batches of one signature, at most ``limit``; None where there are none."""
        first = self._next()
        if first is None:
            return None
        whole = maker.rows == 1 or not all(map(_on_host, jax.tree.leaves(first.value)))
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

    def _following(self, first: Batch, limit: int, request: _Fill) -> Iterator[Batch]:
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


class _Serving:
    """A position in `Batches`: two integers."""

    def __init__(self, batches: Batches, epoch: int, index: int) -> None:
        self.epoch, self.read = epoch, index
        self.length = len(batches)
        self._batches = batches
        self._order: Any = _END

    def more(self) -> bool:
        """Whether there is another batch."""
        return self.read < self.length

    def sample(self) -> Batch | None:
        """The next batch, which stays."""
        for value in self._batches.epoch(self.epoch, self.read):
            return as_batch(value, f"batch {self.read} of the data")
        return None

    def fill(self, limit: int, maker: _Maker, request: _Fill) -> Stack | None:
        """As of an iterator, by one gather."""
        del request  # it does not have to wait for anything
        batches, index, size = self._batches, self.read, self._batches.batch_size
        if index >= len(batches):
            return None
        if self._order is _END:
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

    def _gathered(self, index: int, count: int, maker: _Maker) -> Stack:
        batches = self._batches
        order = None if self._order is None else maker.place(self._order.astype(np.int32))
        sample = as_batch(next(batches.epoch(self.epoch, index)), "the data")
        source = Gathered(
            maker.put_once(batches), order, batches.batch_size, batches.num_examples, batches.pad
        )
        return Stack(source, count, sample.signature, index)


_Cursor = _Iterating | _Serving


class Feed:
    """Reads any kind of data set, ahead of the device, and knows what was consumed."""

    def __init__(self, data: Any, *, epochs: int, iterations: int | None) -> None:
        self.data, self.epochs, self.iterations = data, epochs, iterations
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
        self._maker = _Maker(1, Placement())
        self._cursor: _Cursor = _Iterating(data if self.one_shot else iter(()), 0, self.one_shot)
        self._upcoming: _Cursor | None = None
        self._open_epoch: int | None = None
        self._consumed = 0
        self._stack: Stack | None = None
        self._coming: _Fill | None = None
        self._numbers: dict[int, Any] = {}
        self._queue: queue.SimpleQueue[_Fill | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def configure(self, rows: int, place: Placement, numbers: dict[Any, Any]) -> None:
        """Says how many batches a stack may hold and where arrays belong.

        ``numbers`` remembers scalars that are on a device; it may outlive the feed.
        """
        self._maker = _Maker(rows, place)
        self._numbers = numbers.setdefault(place, {})

    @property
    def num_read(self) -> int:
        """How many batches were read of the iterator or the epoch, consumed or not."""
        return self._cursor.read

    # --- positions -----------------------------------------------------------------------------

    def _cursor_at(self, epoch: int, skip: int) -> _Cursor:
        data = self.data
        if not isinstance(data, Batches) and not hasattr(data, "__iter__"):
            data = data(epoch)
        if isinstance(data, Batches):
            return _Serving(data, epoch, skip)
        cursor = _Iterating(iter(data), epoch, one_shot=False)
        with contextlib.suppress(TypeError):  # not sized, or of a length that is not known
            cursor.length = len(data)
        cursor.skip(skip)
        return cursor

    def open(self, epoch: int, skip: int) -> int | None:
        """Makes ready for an epoch, ``skip`` batches of which were consumed before.

        Returns:
            The number of its batches, or None if that is not known.
        """
        if self.data is None:
            return self.iterations
        if self._open_epoch != epoch or skip or self._consumed:
            self._consumed = skip
            if self.one_shot:
                pass
            elif self._upcoming is not None and self._upcoming.epoch == epoch and not skip:
                self._cursor, self._upcoming = self._upcoming, None
            else:
                self._forget()
                self._cursor = self._cursor_at(epoch, skip)
            self._open_epoch = epoch
        length = self._cursor.length
        if self.iterations is not None:
            length = self.iterations if length is None else min(length, self.iterations)
        return length

    def close_epoch(self) -> None:
        """Ends an epoch: a re-iterable starts anew, a one-shot iterator just continues."""
        self._open_epoch = None
        if self._upcoming is None:
            self._forget()
        else:
            self._stack = None  # what is coming belongs to the next epoch

    def _forget(self) -> None:
        """Drops what was prepared; a one-shot iterator gets its batches back."""
        unread = self._unread() if self.one_shot else []
        if self._coming is not None:
            self._wait(self._coming, patience_s=0.0)
        self._stack = self._coming = self._upcoming = None
        if isinstance(self._cursor, _Iterating) and self.one_shot:
            self._cursor.held = collections.deque(unread)

    def _unread(self) -> list[Batch]:
        """The batches that were read and not consumed, in order."""
        assert isinstance(self._cursor, _Iterating)
        batches: list[Batch] = []
        if self._stack is not None:
            batches += self._stack.kept[self._stack.taken :]
        if self._coming is not None:
            self._wait(self._coming, patience_s=0.0)
            if self._coming.stack is not None:
                batches += self._coming.stack.kept
        return [*batches, *self._cursor.held]

    @property
    def unread(self) -> tuple[Any, tuple[Batch, ...]] | None:
        """What was read from a one-shot iterator and not consumed."""
        return (self.data, tuple(self._unread())) if self.one_shot else None

    def restore_unread(self, unread: tuple[Any, tuple[Batch, ...]] | None) -> None:
        """Puts back what an earlier run read from this very iterator and did not consume."""
        cursor = self._cursor
        if unread is not None and unread[0] is self.data and isinstance(cursor, _Iterating):
            cursor.held = collections.deque(unread[1])

    # --- reading -------------------------------------------------------------------------------

    def sample(self) -> Batch | None:
        """The next batch, which stays; None where the data end."""
        return _NO_BATCH if self.data is None else self._cursor.sample()

    def more(self) -> bool:
        """Whether the epoch has another batch; where nothing is prepared, it reads one."""
        if self.data is None or self.prepared:
            return True
        if self._coming is not None and self._upcoming is None:
            return self._receive()
        return self._cursor.more()

    def read(self, limit: int, most: int, late: Late) -> Window:
        """As `take`, where nothing is prepared: reads it here and now.

        Args:
            limit: The most that the block may have.
            most: The most to read, from ``limit`` on.
            late: Asked between batches: whether those that are there must do.
        """
        if self.data is not None:
            self._coming = _Fill(self._cursor, self._within(most), self._maker, late)
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
            cursor = self._upcoming = _Serving(self.data, epoch, 0)
            limit = most if self.iterations is None else min(most, self.iterations)
        self._coming = _Fill(cursor, limit, self._maker, None)
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

    def _submit(self, fill: _Fill) -> None:
        if self._thread is None:
            # JAX keeps some of its settings by thread: this one is to read as its owner would.
            names = ("jax_enable_x64", "jax_default_device")
            arguments = (self._queue, *(getattr(jax.config, name) for name in names))
            self._thread = threading.Thread(
                target=_work, args=arguments, name="jaxloop-feed", daemon=True
            )
            self._thread.start()
        self._queue.put(fill)

    def _wait(self, fill: _Fill, patience_s: float) -> None:
        if fill.done.is_set() or fill.done.wait(patience_s):
            return
        fill.hurry()
        while not fill.done.wait(POLL_S):
            pass

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
        """Ends the thread, after the batch that it is reading."""
        if self._thread is not None:
            if self._coming is not None:
                self._coming.hurry()
            self._queue.put(None)
            self._thread.join()
            self._thread = None


def _work(fills: queue.SimpleQueue[_Fill | None], x64: bool, device: Any) -> None:
    with jax.enable_x64(x64), jax.default_device(device):
        for fill in iter(fills.get, None):
            assert fill is not None
            fill.run()
