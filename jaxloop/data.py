"""Data: in-memory batches, and one way to read every kind of data set.

    train = batches((images, labels), 32, shuffle=True, pad=True)
    feed = Feed(train, iterations=None)
    feed.open(epoch=0, skip=0)
    feed.take(10)          # at most ten batches of one shape

A `Feed` never reads further than it is asked to; what it read and did not hand out comes first
when it goes on.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxloop.errors import ArgumentError, ArgumentTypeError, DataError

PyTree = Any


def batches(
    arrays: PyTree,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    drop_remainder: bool = False,
    pad: bool = False,
) -> Batches:
    """Serves arrays in memory as batches; each epoch's order is a function of ``(seed, epoch)``.

    Args:
        arrays: A pytree of arrays of shape ``(num_examples, *rest)``, for a trainer
            ``(x, y)`` or ``(x, y, sample_weight)``.
        batch_size: Examples in a batch, at least 1.
        shuffle: Whether each epoch has an order of its own.
        seed: What the orders are made from.
        drop_remainder: Whether a last batch that is not full is left out.
        pad: Whether a last batch that is not full is filled, by repeating its last example, and
            marked: a pair becomes ``(x, y, mask)`` with a boolean mask of shape ``(batch,)``, a
            triple's weight is multiplied by the mask, a dict gets ``"mask"``.

    Returns:
        A re-iterable with a length. Plain iteration gives epoch 0.

    Raises:
        ArgumentError: The arrays do not agree in their first axis, there are none, ``batch_size``
            is below 1, or ``pad`` cannot mark the structure.

    Example:
        >>> [b.shape for b in batches(np.zeros((5, 2)), 2)]
        [(2, 2), (2, 2), (1, 2)]
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise ArgumentTypeError(f"batches: batch_size must be an int, and is {batch_size!r}")
    if batch_size < 1:
        raise ArgumentError(f"batches: batch_size must be at least 1, and is {batch_size}")
    if pad and drop_remainder:
        raise ArgumentError(
            "batches: pad and drop_remainder exclude each other", fix="choose one of them"
        )
    arrays = jax.tree.map(np.asarray, arrays)
    sizes = {
        jax.tree_util.keystr(path): leaf.shape[0] if leaf.ndim else None
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }
    if not sizes or None in sizes.values() or len(set(sizes.values())) > 1:
        raise ArgumentError(
            "batches: every array needs the same number of examples in its first axis, and the "
            f"arrays have {sizes or 'no leaves'}",
            fix="pass a pytree of arrays of shape (num_examples, *rest), such as (x, y)",
        )
    if pad and not (
        isinstance(arrays, dict) or (isinstance(arrays, tuple | list) and len(arrays) in (2, 3))
    ):
        raise ArgumentError(
            f"batches: pad=True marks a pair, a triple or a dict, and got {type(arrays).__name__}",
            fix="pass (x, y), (x, y, sample_weight) or a dict, or use drop_remainder=True",
        )
    if pad and isinstance(arrays, dict) and "mask" in arrays:
        raise ArgumentError("batches: pad=True adds 'mask' to a dict, and there is one already")
    (num_examples,) = set(sizes.values())
    assert num_examples is not None
    return Batches(arrays, num_examples, batch_size, shuffle, seed, drop_remainder, pad)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Batches:
    """What `batches` returns: a re-iterable whose position is two integers, epoch and batch."""

    arrays: PyTree
    num_examples: int
    batch_size: int
    shuffle: bool
    seed: int
    drop_remainder: bool
    pad: bool

    def __len__(self) -> int:
        full, rest = divmod(self.num_examples, self.batch_size)
        return full + (1 if rest and not self.drop_remainder else 0)

    def __iter__(self) -> Iterator[PyTree]:
        return self.epoch(0)

    def __repr__(self) -> str:
        return f"batches({self.num_examples} examples, batch_size={self.batch_size})"

    def order(self, epoch: int) -> np.ndarray[Any, Any] | None:
        """The examples' order in an epoch, or None for their own."""
        if not self.shuffle:
            return None
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[PyTree]:
        """The batches of one epoch, from batch ``start`` on."""
        order = self.order(epoch)
        for index in range(start, len(self)):
            low = index * self.batch_size
            high = min(low + self.batch_size, self.num_examples)
            where: Any = slice(low, high) if order is None else order[low:high]
            batch = jax.tree.map(lambda a, where=where: a[where], self.arrays)
            yield self._padded(batch, high - low) if self.pad else batch

    def _padded(self, batch: PyTree, count: int) -> PyTree:
        missing = self.batch_size - count
        mask = np.arange(self.batch_size) < count
        if missing:
            # Real rows, not zeros: a model may turn zeros into NaN, and NaN * 0 is NaN.
            batch = jax.tree.map(
                lambda a: np.concatenate([a, np.repeat(a[-1:], missing, 0)]), batch
            )
        if isinstance(batch, dict):
            return {**batch, "mask": mask}
        if len(batch) == 2:
            return (*batch, mask)
        return (batch[0], batch[1], batch[2] * mask.astype(batch[2].dtype))


class Signature(NamedTuple):
    """The structure, shapes and dtypes of a batch: what an executable depends on."""

    tree: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]


class Batch(NamedTuple):
    """A batch as arrays, with its signature."""

    value: PyTree
    signature: Signature


def as_batch(batch: PyTree, where: str) -> Batch:
    """The batch with every leaf as an array of a dtype that JAX uses.

    Raises:
        DataError: A leaf is not numeric; the error names it.
    """
    leaves, tree = jax.tree.flatten(batch)
    arrays = []
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, jax.Array):
            try:
                leaf = np.asarray(leaf)
                if not (leaf.dtype == bool or jax.dtypes.issubdtype(leaf.dtype, np.number)):
                    raise TypeError(leaf.dtype)
                dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
            except (TypeError, ValueError):
                path = jax.tree_util.tree_leaves_with_path(batch)[index][0]
                raise DataError(
                    f"{where}: the leaf batch{jax.tree_util.keystr(path)} is not an array of "
                    f"numbers but {type(leaves[index]).__name__} {leaves[index]!r:.80}",
                    fix="give batches that are pytrees of arrays; for arrays in memory use "
                    "jl.batches((x, y), batch_size)",
                ) from None
            if leaf.dtype != dtype:
                leaf = leaf.astype(dtype)
        arrays.append(leaf)
    signature = Signature(tree, tuple((a.shape, a.dtype) for a in arrays))
    return Batch(jax.tree.unflatten(tree, arrays), signature)


def signature_change(old: Signature, new: Signature) -> str:
    """Which leaves differ, in words."""
    if old.tree != new.tree:
        return f"the structure of the batch changed from {old.tree} to {new.tree}"
    skeleton = jax.tree.unflatten(new.tree, range(len(new.leaves)))
    names = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(skeleton)
    ]
    return "; ".join(
        f"batch{name} changed from {_describe(*a)} to {_describe(*b)}"
        for name, a, b in zip(names, old.leaves, new.leaves, strict=True)
        if a != b
    )


def _describe(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def stack(values: list[PyTree], capacity: int) -> PyTree:
    """Batches of one signature as one pytree with a leading axis of ``capacity``.

    Host arrays are copied once, into fresh memory that nobody writes again, because a device may
    alias it. Rows past the last batch are left as they are: no step reads them.
    """

    def one(*leaves: Any) -> Any:
        first = leaves[0]
        if isinstance(first, jax.Array) and (
            jax.dtypes.issubdtype(first.dtype, jax.dtypes.extended)
            or first.sharding.device_set != {jax.devices("cpu")[0]}
        ):
            return jax.numpy.stack([*leaves, *[first] * (capacity - len(leaves))])
        buffer = _aligned((capacity, *first.shape), first.dtype)
        for row, leaf in enumerate(leaves):
            buffer[row] = leaf
        return buffer

    return jax.tree.map(one, *values)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Uninitialised memory at a multiple of 64 bytes: the CPU backend takes it without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


class Feed:
    """Reads any kind of data set, batch by batch, and knows what was read and not consumed."""

    def __init__(self, data: Any, *, epochs: int, iterations: int | None) -> None:
        self.data = data
        self.iterations = iterations
        self.one_shot = data is not None and hasattr(data, "__next__")
        self.read = 0
        self._iterator: Iterator[Any] = iter(())
        self._pending: collections.deque[Batch] = collections.deque()
        self._open_epoch: int | None = None
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

    def _iterable(self, epoch: int) -> Any:
        if hasattr(self.data, "__iter__"):
            return self.data
        return self.data(epoch)

    def open(self, epoch: int, skip: int) -> int | None:
        """Makes ready for an epoch, ``skip`` batches of which were consumed before.

        Returns:
            The number of its batches, or None if that is not known.
        """
        length: int | None = None
        if self.data is None:
            return self.iterations
        if self.one_shot:
            self._iterator = self.data
        elif self._open_epoch == epoch and skip == 0:
            return self._length  # opened for the sample already
        else:
            self._pending.clear()
            iterable = self.data if isinstance(self.data, Batches) else self._iterable(epoch)
            try:
                length = len(iterable)
            except TypeError:
                length = None  # not sized, or of a length that is not known
            if isinstance(iterable, Batches):
                self._iterator = iterable.epoch(epoch, skip)
            else:
                self._iterator = iter(iterable)
                for index in range(skip):
                    if next(self._iterator, _END) is _END:
                        raise DataError(
                            f"epoch {epoch} goes on after {skip} batches, and the data gave only "
                            f"{index}",
                            fix="resume with the data set that the run had",
                        )
        self._open_epoch = epoch
        if self.iterations is not None:
            length = self.iterations if length is None else min(length, self.iterations)
        self._length: int | None = length
        return length

    def close_epoch(self) -> None:
        """Ends an epoch: a re-iterable starts anew, a one-shot iterator just continues."""
        self._open_epoch = None
        if not self.one_shot:
            self._pending.clear()

    def _fill(self, count: int) -> None:
        while len(self._pending) < count:
            item = next(self._iterator, _END)
            if item is _END:
                return
            self._pending.append(as_batch(item, f"batch {self.read} of the data"))
            self.read += 1

    def peek(self) -> Batch | None:
        """The next batch, which stays; None where the data end."""
        if self.data is None:
            return _NO_BATCH
        self._fill(1)
        return self._pending[0] if self._pending else None

    def take(self, count: int) -> list[Batch]:
        """Up to ``count`` batches of one signature; at least one, as `peek` saw it."""
        if self.data is None:
            return [_NO_BATCH] * count
        self._fill(1)
        taken = [self._pending.popleft()]
        while len(taken) < count:
            self._fill(1)
            if not self._pending or self._pending[0].signature != taken[0].signature:
                break
            taken.append(self._pending.popleft())
        return taken

    @property
    def unread(self) -> tuple[Any, tuple[Batch, ...]] | None:
        """What was read from a one-shot iterator and not consumed."""
        return (self.data, tuple(self._pending)) if self.one_shot else None

    def restore_unread(self, unread: tuple[Any, tuple[Batch, ...]] | None) -> None:
        """Puts back what an earlier run read from this very iterator and did not consume."""
        if unread is not None and unread[0] is self.data and not self._pending:
            self._pending.extend(unread[1])


_END = object()
_NO_BATCH = Batch(None, Signature(None, ()))
