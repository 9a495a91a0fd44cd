"""Arrays of one shape and dtype, so that a loss never broadcasts by accident.

    y_true, y_pred = same_shape("huber", y_true, y_pred)

Invariant: targets get the dtype of the predictions, and never change its shape.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors


def as_float(values: ArrayLike) -> jax.Array:
    """Returns an array of floats. Integers become JAX's default float."""
    array = jnp.asarray(values)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(float_dtype())


def float_dtype() -> jnp.dtype:
    """Returns JAX's default float dtype: float32, or float64 if x64 is enabled."""
    return jnp.zeros(()).dtype


def same_shape(name: str, y_true: ArrayLike, y_pred: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Returns targets and predictions as arrays of one shape, in the predictions' dtype.

    Args:
        name: The loss, for the error message.
        y_true: ``(batch, *rest)``.
        y_pred: ``(batch, *rest)``.

    Raises:
        ShapeError: The shapes differ.
    """
    predictions, targets = as_float(y_pred), jnp.asarray(y_true)
    if targets.shape != predictions.shape:
        # (batch, 1) and (batch,) would broadcast to (batch, batch) and give a wrong number.
        raise errors.ShapeError(
            f"{name}: y_true and y_pred must have the same shape, got y_true {targets.shape} and "
            f"y_pred {predictions.shape}",
            fix="make them equal: squeeze a trailing axis of length 1 (y_pred[:, 0]) or add one "
            "(y_true[:, None])",
        )
    return targets.astype(predictions.dtype), predictions


def trailing_mean(values: jax.Array) -> jax.Array:
    """Returns the mean over all axes but the first."""
    return values if values.ndim <= 1 else jnp.mean(values, axis=tuple(range(1, values.ndim)))
