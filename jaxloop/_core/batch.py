"""A batch as arrays, and its signature.

    batch = as_batch((images, labels), "the first batch")
    batch.signature        # structure, shapes and dtypes

Every leaf of a `Batch` is an array of a dtype that JAX uses.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxloop._core.placement import check_whole
from jaxloop._core.types import PyTree
from jaxloop.errors import DataError


class Signature(NamedTuple):
    """The structure, shapes and dtypes of a batch or a state. Each needs its own executable."""

    tree: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]


class Batch(NamedTuple):
    """A batch as arrays, with its signature."""

    value: PyTree
    signature: Signature


def canonical(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns the array in the dtype that it would have on a device."""
    if not jax.dtypes.issubdtype(array.dtype, np.number):
        return array
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def as_batch(batch: PyTree, where: str, like: Signature | None = None) -> Batch:
    """Returns the batch with every leaf as an array of a dtype that JAX uses.

    Args:
        batch: A pytree of arrays and numbers.
        where: The name of the batch in errors.
        like: The signature of the previous batch. A batch that agrees with it needs no conversion.

    Raises:
        DataError: A leaf is not numeric; the error names it.
        ShardingError: A leaf is sharded; the error names it.
    """
    leaves, tree = jax.tree.flatten(batch)
    if like is not None and tree == like.tree:
        for leaf, (shape, dtype) in zip(leaves, like.leaves, strict=True):
            if type(leaf) is not np.ndarray or leaf.shape != shape or leaf.dtype != dtype:
                break
        else:
            return Batch(batch, like)
    arrays = [_as_array(leaf, index, batch, where) for index, leaf in enumerate(leaves)]
    signature = Signature(tree, tuple((a.shape, a.dtype) for a in arrays))
    if like is not None and signature == like:
        signature = like  # so that later comparisons are by identity
    return Batch(jax.tree.unflatten(tree, arrays), signature)


def _as_array(leaf: Any, index: int, batch: PyTree, where: str) -> Any:
    if isinstance(leaf, jax.Array):
        if not leaf.sharding.is_fully_replicated:
            check_whole(leaf, f"{where}: the leaf batch{_path(index, batch)}")
        return leaf
    try:
        array = np.asarray(leaf)
        if not (array.dtype == bool or jax.dtypes.issubdtype(array.dtype, np.number)):
            raise TypeError(array.dtype)
        return canonical(array)
    except (TypeError, ValueError):
        raise DataError(
            f"{where}: the leaf batch{_path(index, batch)} must be an array of numbers, got "
            f"{type(leaf).__name__} {leaf!r:.80}",
            fix="pass batches that are pytrees of arrays; for arrays in memory, use "
            "jl.batches((x, y), batch_size)",
        ) from None


def _path(index: int, batch: PyTree) -> str:
    return jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(batch)[index][0])


def signature_change(old: Signature, new: Signature) -> str:
    """Describes how the leaves of two batches differ, for messages."""
    if old.tree != new.tree:
        return f"the structure of the batch changed from {old.tree} to {new.tree}"
    return "; ".join(
        f"batch{name} changed from {_describe(*a)} to {_describe(*b)}"
        for name, a, b in zip(_names(new.tree), old.leaves, new.leaves, strict=True)
        if a != b
    )


@functools.lru_cache(maxsize=64)
def describe_leaves(tree: Any, leaves: tuple[tuple[tuple[int, ...], Any], ...]) -> str:
    """Describes the leaves of a batch by path, dtype and shape, for a saved position.

    Example:
        >>> describe_leaves(jax.tree.structure((1, 2)), (((3, 4), "float32"), ((3,), "int32")))
        'batch[0] float32[3,4]; batch[1] int32[3]'
    """
    return "; ".join(
        f"batch{name} {_describe(*leaf)}" for name, leaf in zip(_names(tree), leaves, strict=True)
    )


def _names(tree: Any) -> list[str]:
    skeleton = jax.tree.unflatten(tree, range(tree.num_leaves))
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(skeleton)]


def _describe(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"
