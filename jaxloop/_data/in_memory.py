"""Batches of arrays in memory.

    train = batches((images, labels), 32, shuffle=True, pad=True)
    for batch in train.epoch(3):
        ...

The order of each epoch is a function of ``(seed, epoch)``, so a position is two integers.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxloop._core.batch import Batch, Signature, canonical, describe_leaves
from jaxloop._core.placement import Placement, check_whole
from jaxloop._core.types import PyTree
from jaxloop._data.padding import marked
from jaxloop._data.position import Position
from jaxloop._data.sampling import Sampling, sampling_of
from jaxloop.errors import ArgumentError, ArgumentTypeError


def batches(
    arrays: PyTree,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    drop_remainder: bool = False,
    pad: bool = False,
    device: bool = False,
    balance: ArrayLike | str | None = None,
    sampling_weights: ArrayLike | None = None,
) -> Batches:
    """Serves arrays in memory as batches. Each epoch's order is a function of ``(seed, epoch)``.

    Args:
        arrays: A pytree of arrays of shape ``(num_examples, *rest)``, for a trainer
            ``(x, y)`` or ``(x, y, sample_weight)``.
        batch_size: Examples in a batch, at least 1.
        shuffle: Whether to draw a new order for each epoch.
        seed: The seed of the orders.
        drop_remainder: Whether to drop a last batch that is not full.
        pad: Whether to fill a last batch that is not full by repeating its last example, and to add
            a mask. A pair becomes ``(x, y, mask)`` with a boolean mask of shape ``(batch,)``. In a
            triple, the weight is multiplied by the mask. A dict gets the key ``"mask"``.
        device: Whether to put the arrays on the device once and gather the batches there, inside
            the compiled block, so that no full batch is copied from the host during a run. On a
            CPU, shuffled arrays between 512 KiB and 256 MiB are gathered once per epoch instead,
            which is faster and needs their memory a second time.
        balance: The class of each example, integers, booleans or strings of shape
            ``(num_examples,)``, or the name of a part of a dict. An epoch still has
            ``num_examples`` examples, in a new random order, but as many of each class, up to one.
            Of a large class it has a new random part, and of a small class every example several
            times.
        sampling_weights: A weight for each example, at least 0, of shape ``(num_examples,)``. Each
            of the ``num_examples`` places in an epoch is drawn independently, with a probability in
            proportion to the weights. An example may come several times or not at all.

    Returns:
        A re-iterable with a length. Plain iteration gives epoch 0.

    Raises:
        ArgumentError: There are no arrays, the arrays differ in their first axis, ``batch_size``
            is below 1, ``seed`` is negative, ``pad`` cannot add a mask to the structure, or labels
            or weights are not one for each example, or are negative, infinite, NaN or all 0.
        ArgumentTypeError: ``batch_size`` or ``seed`` is not an int, or labels or weights are of
            another type.
        UnknownNameError: The data have no part of the name ``balance``.
        ShardingError: An array is sharded over several devices.

    Example:
        >>> [b.shape for b in batches(np.zeros((5, 2)), 2)]
        [(2, 2), (2, 2), (1, 2)]
        >>> labels = np.array([0, 0, 0, 0, 0, 1])
        >>> [b.tolist() for b in batches(labels, 3, balance=labels)]
        [[1, 0, 0], [0, 1, 1]]
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise ArgumentTypeError(
            f"batches: batch_size must be an int, got {batch_size!r}",
            fix="pass a whole number such as 32",
        )
    if batch_size < 1:
        raise ArgumentError(
            f"batches: batch_size must be at least 1, got {batch_size}",
            fix="pass a whole number such as 32",
        )
    if pad and drop_remainder:
        raise ArgumentError(
            "batches: pad and drop_remainder cannot both be True", fix="pass only one of them"
        )
    # Converted to the dtypes of a device once, instead of for every batch.
    arrays = jax.tree.map(_on_host, arrays)
    num_examples = _num_examples(arrays)
    if pad:
        _check_can_be_marked(arrays)
    sampling = sampling_of(arrays, num_examples, balance, sampling_weights)
    return Batches(
        arrays,
        num_examples,
        batch_size,
        bool(shuffle) or sampling is not None,
        _checked_seed(seed),
        bool(drop_remainder),
        bool(pad),
        device,
        sampling,
    )


def _checked_seed(seed: Any) -> int:
    try:
        number = operator.index(seed)  # NumPy's integers too
    except TypeError:
        raise ArgumentTypeError(
            f"batches: seed must be an int, got {seed!r}", fix="pass a whole number such as 0"
        ) from None
    if number < 0:
        raise ArgumentError(
            f"batches: seed must be at least 0, got {seed}", fix="pass a whole number such as 0"
        )
    return number


def _on_host(leaf: Any) -> np.ndarray[Any, Any]:
    if isinstance(leaf, jax.Array):
        check_whole(leaf, "batches: every array")
    return canonical(np.asarray(leaf))


def _num_examples(arrays: PyTree) -> int:
    sizes = {
        jax.tree_util.keystr(path): leaf.shape[0] if leaf.ndim else None
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }
    found = set(sizes.values())
    num_examples = found.pop() if len(found) == 1 else None
    if num_examples is None:
        raise ArgumentError(
            "batches: every array must have the same number of examples in its first axis, got "
            f"{sizes or 'no arrays'}",
            fix="pass a pytree of arrays of shape (num_examples, *rest), such as (x, y)",
        )
    return int(num_examples)


def _check_can_be_marked(arrays: PyTree) -> None:
    if not (
        isinstance(arrays, dict) or (isinstance(arrays, tuple | list) and len(arrays) in (2, 3))
    ):
        raise ArgumentError(
            "batches: with pad=True, the data must be a pair, a triple or a dict, got "
            f"{type(arrays).__name__}",
            fix="pass (x, y), (x, y, sample_weight) or a dict, or use drop_remainder=True",
        )
    if isinstance(arrays, dict) and "mask" in arrays:
        raise ArgumentError(
            "batches: pad=True adds the key 'mask' to a dict, but this dict already has one",
            fix="rename that key, or use drop_remainder=True",
        )


_SETTINGS = ("num_examples", "batch_size", "shuffle", "seed", "drop_remainder", "pad")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Batches:
    """A re-iterable over arrays in memory. Its position is two integers, epoch and batch."""

    arrays: PyTree
    num_examples: int
    batch_size: int
    shuffle: bool
    seed: int
    drop_remainder: bool
    pad: bool
    device: bool = False
    sampling: Sampling | None = None
    placed: dict[Placement, PyTree] = dataclasses.field(default_factory=dict)
    """The arrays on the device, by placement."""

    def __len__(self) -> int:
        full, rest = divmod(self.num_examples, self.batch_size)
        return full + (1 if rest and not self.drop_remainder else 0)

    @property
    def num_full(self) -> int:
        """The number of batches that have ``batch_size`` examples, padding included."""
        return len(self) if self.pad else self.num_examples // self.batch_size

    def __iter__(self) -> Iterator[PyTree]:
        return self.epoch(0)

    def __repr__(self) -> str:
        return f"batches({self.num_examples} examples, batch_size={self.batch_size})"

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What determines the batches, apart from the values of the arrays."""
        leaves, tree = jax.tree.flatten(self.arrays)
        return {
            "kind": "jl.batches",
            **{name: getattr(self, name) for name in _SETTINGS},
            "sampling": "none" if self.sampling is None else self.sampling.description,
            "examples": describe_leaves(tree, tuple((a.shape[1:], a.dtype) for a in leaves)),
        }

    @functools.cached_property
    def position(self) -> Position:
        """The position of a run in these batches: the settings, as the counters say the rest."""
        return Position(settings=self.settings)

    def order(self, epoch: int) -> np.ndarray[Any, Any] | None:
        """Returns the order of the examples in an epoch, or None for the original order."""
        if not self.shuffle:
            return None
        rng = np.random.default_rng([self.seed, epoch])
        if self.sampling is not None and self.num_examples:
            return self.sampling.order(rng)
        return rng.permutation(self.num_examples)

    @functools.cached_property
    def signature(self) -> Signature:
        """The signature of a batch, with its mask if ``pad`` is set. The last may be shorter."""
        first = jax.tree.map(lambda a: a[:1], self.arrays)
        leaves, tree = jax.tree.flatten(marked(first, np.ones(1, bool)) if self.pad else first)
        size = self.batch_size
        return Signature(tree, tuple(((size, *a.shape[1:]), a.dtype) for a in leaves))

    @functools.cached_property
    def shapes(self) -> Batch:
        """A batch with shapes in place of arrays."""
        shapes = [jax.ShapeDtypeStruct(*leaf) for leaf in self.signature.leaves]
        return Batch(self.signature.tree.unflatten(shapes), self.signature)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[PyTree]:
        """Yields the batches of one epoch, from batch ``start``."""
        order = self.order(epoch)
        for index in range(start, len(self)):
            yield self.batch(order, index)

    def batch(self, order: np.ndarray[Any, Any] | None, index: int) -> PyTree:
        """Returns one batch of the epoch that has this order."""
        low = index * self.batch_size
        size = self.batch_size if self.pad else min(self.batch_size, self.num_examples - low)
        where = self.examples(order, low, low + size)
        batch = jax.tree.map(lambda a: a[where], self.arrays)
        return marked(batch, np.arange(low, low + size) < self.num_examples) if self.pad else batch

    def examples(self, order: np.ndarray[Any, Any] | None, low: int, high: int) -> Any:
        """Returns the indices of the examples from place ``low`` to ``high`` of an epoch."""
        if order is None and high <= self.num_examples:
            return slice(low, high)
        # Real rows fill a last batch instead of zeros, because a model may turn zeros into NaN, and
        # NaN * 0 is NaN.
        places = np.minimum(np.arange(low, high), self.num_examples - 1)
        return places if order is None else order[places]
