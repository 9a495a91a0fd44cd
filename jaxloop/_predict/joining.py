"""Predictions of many batches as one pytree, and as arrays that their user may write.

    joined([{"y": np.ones(2)}, {"y": np.ones(1)}])      # {"y": np.ones(3)}

Invariant: no prediction is in memory twice, but for the batch that is being copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxloop._core.batch import Signature, describe_leaves
from jaxloop._core.types import PyTree
from jaxloop.errors import ShapeError


def joined(predictions: Iterable[PyTree]) -> PyTree:
    """Returns the predictions of all batches as one pytree, joined along the first axis."""
    parts: list[list[np.ndarray[Any, Any]]] = []
    known: Signature | None = None
    for index, prediction in enumerate(predictions):
        leaves, tree = jax.tree.flatten(prediction)
        rests = Signature(tree, tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves))
        if known is None:
            known, parts = rests, [[] for _ in leaves]
        elif rests != known:
            raise ShapeError(
                "predictor: the predictions of all batches must agree but for their first axis, "
                f"got {describe_leaves(*known).replace('batch', 'prediction')} and, for batch "
                f"{index}, {describe_leaves(*rests).replace('batch', 'prediction')}",
                fix="pad the inputs to one shape, or use stream instead of run",
            )
        for so_far, leaf in zip(parts, leaves, strict=True):
            so_far.append(leaf)
    assert known is not None
    return jax.tree.unflatten(known.tree, map(_concatenated, parts))


def _concatenated(parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Joins arrays, and drops each when it is copied, so that memory holds them once."""
    size = sum(map(len, parts))
    joined = np.empty((size, *parts[0].shape[1:]), parts[0].dtype)
    parts.reverse()
    filled = 0
    while parts:
        part = parts.pop()
        joined[filled : filled + len(part)] = part
        filled += len(part)
    return joined


def owned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns an array that may be written. The memory of a device may not."""
    return array if array.flags.writeable else array.copy()
