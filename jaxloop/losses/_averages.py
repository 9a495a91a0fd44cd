"""The averages of a loss: over the axes of one example, and over the examples of a batch.

    values = per_example(loss_values, num_examples)         # (batch,)
    scalar = reduce(values, sample_weight, num_examples)

Invariant: examples of weight 0 add nothing, even if their loss is NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop.losses._shapes import float_dtype, trailing_mean


def per_example(values: ArrayLike, num_examples: int) -> jax.Array:
    """Returns one value per example: the mean over all axes but the first.

    Args:
        values: ``(batch, *rest)``, or a scalar, which is returned unchanged.
        num_examples: The length of the batch axis.

    Returns:
        ``(batch,)``, or the scalar.

    Raises:
        ShapeError: The first axis of ``values`` is not the batch axis.

    Example:
        >>> import jax.numpy as jnp
        >>> per_example(jnp.array([[1.0, 3.0]]), 1).tolist()
        [2.0]
    """
    array = jnp.asarray(values)
    if array.ndim == 0:
        return array
    if array.shape[0] != num_examples:
        raise errors.ShapeError(
            f"a loss must return one value per example or a scalar, got shape {array.shape} for a "
            f"batch of {num_examples} examples",
            fix="return one value per example, or a scalar",
        )
    return trailing_mean(array)


def reduce(loss_value: ArrayLike, sample_weight: ArrayLike | None, num_examples: int) -> jax.Array:
    """Returns the weighted average of a loss over the examples, ``sum(l * w) / sum(w)``.

    The sum is computed in float32, or in float64 if the loss is float64. Examples of weight 0 add
    nothing, even if their loss is NaN. If all weights are 0, the result is 0.

    Args:
        loss_value: ``(batch, *rest)`` or a scalar.
        sample_weight: ``(batch,)`` of bool, int or float, or None.
        num_examples: The length of the batch axis.

    Returns:
        A scalar.

    Raises:
        ShapeError: The loss is a scalar and the batch has weights, or a shape does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> float(reduce(jnp.array([1.0, 3.0]), jnp.array([1.0, 3.0]), 2))
        2.5
    """
    values = per_example(loss_value, num_examples)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(float_dtype())
    values = values.astype(jnp.float64 if values.dtype == jnp.float64 else jnp.float32)
    if sample_weight is None:
        return values if values.ndim == 0 else jnp.mean(values)
    if values.ndim == 0:
        raise errors.ShapeError(
            "a loss must return one value per example when the batch has sample weights or a "
            "mask, got a scalar",
            fix="return one value per example",
        )
    weight = jnp.asarray(sample_weight)
    if weight.shape != (num_examples,):
        raise errors.ShapeError(
            f"sample_weight must have shape ({num_examples},), got {weight.shape}",
            fix="pass one weight per example",
        )
    weight = weight.astype(values.dtype)
    total = jnp.sum(jnp.where(weight == 0, 0, values * weight))
    norm = jnp.sum(weight)
    return jnp.where(norm == 0, 0, total / jnp.where(norm == 0, 1, norm))
