"""The weights of the examples in a batch.

    weights = batch_weights(outputs.get("sample_weight"), num_examples, "metric 'accuracy'")
    acc = acc + jnp.where(weights.present, value, 0)

Invariant: a weight is one number per example. A batch whose weights are all 0 counts as empty.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.metrics.exact_sum import Pair, sum_weights


class BatchWeights(NamedTuple):
    """The weights of one batch.

    Attributes:
        weight: ``(batch,)`` or None.
        num_examples: The length of the batch axis, a Python int.
        total: The sum of the weights, or the number of examples if the batch has none.
        present: Whether ``total`` is not 0, a boolean scalar.
    """

    weight: jax.Array | None
    num_examples: int
    total: Pair
    present: jax.Array


def batch_weights(weight: ArrayLike | None, num_examples: int, where: str) -> BatchWeights:
    """Checks the weights of a batch and sums them.

    Args:
        weight: ``(batch,)`` of bool, int or float, or None.
        num_examples: The length of the batch axis.
        where: The metric, for the error message.

    Raises:
        ShapeError: The weights are not one number per example.
    """
    array = check_weight(weight, num_examples, where)
    total = sum_weights(array, num_examples)
    return BatchWeights(array, num_examples, total, total.hi != 0)


def check_weight(weight: ArrayLike | None, num_examples: int, where: str) -> jax.Array | None:
    """Returns the weights as an array, or None if the batch has none.

    Raises:
        ShapeError: The weights are not one number per example.
    """
    if weight is None:
        return None
    array = jnp.asarray(weight)
    if array.shape != (num_examples,):
        raise errors.ShapeError(
            f"{where}: weight (sample_weight or mask) must have shape ({num_examples},), got "
            f"{array.shape}",
            fix="pass one weight per example",
        )
    return array


def is_float_weight(weight: ArrayLike | None) -> bool:
    """Returns whether the weights are floats, and so may be fractions."""
    return weight is not None and bool(jnp.issubdtype(jnp.result_type(weight), jnp.floating))


def leading_axis(values: PyTree) -> int | None:
    """Returns the length of the first axis of the first array that has one."""
    for leaf in jax.tree.leaves(values):
        shape = getattr(leaf, "shape", ())
        if shape:
            return int(shape[0])
    return None


def scalar_with_weights(name: str, otherwise: str = "") -> errors.ShapeError:
    """Returns the error for a scalar that cannot be weighted by example.

    Args:
        name: The metric.
        otherwise: What else would fix it.
    """
    return errors.ShapeError(
        f"metric {name!r} must return one value per example when the batch has sample weights or "
        "a mask, got a scalar, whose average would not be exact",
        fix=f"return one value per example{otherwise}",
    )
