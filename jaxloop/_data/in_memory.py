"""Data in memory as batches, and what a batch is.

    train = batches((images, labels), 32, shuffle=True, pad=True)
    batch = as_batch(next(iter(train)), "the first batch")
    batch.signature        # what an executable depends on

The position in `Batches` is two integers: each epoch's order is a function of ``(seed, epoch)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxloop._core.batch import canonical
from jaxloop._core.types import PyTree
from jaxloop._data.padding import marked
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
        device: Whether the arrays are put on the device, once, and batches are gathered there,
            inside the compiled block: nothing is copied from the host while a run goes on.

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
    # Once, as a device would have them: not again for every batch.
    arrays = jax.tree.map(canonical, arrays)
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
    return Batches(arrays, num_examples, batch_size, shuffle, seed, drop_remainder, pad, device)


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
    device: bool = False
    placed: dict[Any, PyTree] = dataclasses.field(default_factory=dict)
    """The arrays on a device, by where they were put."""

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
            size = self.batch_size if self.pad else min(self.batch_size, self.num_examples - low)
            where = self.examples(order, low, low + size)
            batch = jax.tree.map(lambda a, where=where: a[where], self.arrays)
            mask = np.arange(low, low + size) < self.num_examples
            yield marked(batch, mask) if self.pad else batch

    def examples(self, order: np.ndarray[Any, Any] | None, low: int, high: int) -> Any:
        """Where the examples from place ``low`` to ``high`` of an epoch are in the arrays."""
        if order is None and high <= self.num_examples:
            return slice(low, high)
        # Real rows fill a last batch, not zeros: a model may turn zeros into NaN, and NaN * 0 is
        # NaN.
        places = np.minimum(np.arange(low, high), self.num_examples - 1)
        return places if order is None else order[places]
