"""Arrays of one shape and one wide dtype, so that a loss never broadcasts or rounds by accident.

    y_true, y_pred = same_shape("huber", y_true, y_pred)

Invariant: losses compute in float32 or wider. float16 and bfloat16 become float32, float64 stays
float64, and a dtype never narrows.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop._core.types import PyTree


def as_float(values: ArrayLike) -> jax.Array:
    """Returns an array of floats in float32 or wider. Integers become JAX's default float.

    Raises:
        ArgumentTypeError: The values are complex.
    """
    array = jnp.asarray(values)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise errors.ArgumentTypeError(
            f"a loss must get real numbers, got {array.dtype}",
            fix="compute the loss from the real and imaginary parts, or from the absolute value",
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(float_dtype())
    return array.astype(jnp.float32) if array.dtype.itemsize < 4 else array


def float_dtype() -> jnp.dtype:
    """Returns JAX's default float dtype: float32, or float64 if x64 is enabled."""
    return jnp.zeros(()).dtype


def widened(tree: PyTree) -> PyTree:
    """Returns a tree with its floating arrays in float32 or wider, and its other leaves as is."""

    def wide(leaf: PyTree) -> PyTree:
        is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return as_float(leaf) if is_float else leaf

    return jax.tree.map(wide, tree)


def flattened(tree: PyTree, leading: tuple[int, ...]) -> PyTree:
    """Returns a tree in which the axes ``leading`` of each array that begins with them are one.

    Weights of several axes, such as one for each token, make each element an example.

    Args:
        tree: A pytree of arrays. An array whose shape does not begin with ``leading`` stays.
        leading: The shape of the weights. With less than two axes, nothing changes.

    Example:
        >>> flattened((jnp.ones((4, 3, 2)), jnp.ones(4)), (4, 3))[0].shape
        (12, 2)
    """
    if len(leading) < 2:
        return tree

    def flat(leaf: PyTree) -> PyTree:
        shape = jnp.shape(leaf)
        if shape[: len(leading)] != leading:
            return leaf
        # The product and not -1, because an axis may be empty.
        return jnp.reshape(leaf, (math.prod(leading), *shape[len(leading) :]))

    return jax.tree.map(flat, tree)


def same_dtype(y_true: ArrayLike, *y_pred: ArrayLike) -> tuple[jax.Array, ...]:
    """Returns targets and predictions as floats of the widest dtype among them.

    Targets that are not floats take the dtype of the predictions.
    """
    predictions = [as_float(one) for one in y_pred]
    targets = jnp.asarray(y_true)
    floats = list(predictions)
    if jnp.issubdtype(targets.dtype, jnp.inexact):
        targets = as_float(targets)
        floats.append(targets)
    # Chosen by size, because under strict promotion `promote_types` refuses to mix.
    dtype = max((one.dtype for one in floats), key=lambda dtype: dtype.itemsize)
    return tuple(one.astype(dtype) for one in (targets, *predictions))


def same_shape(name: str, y_true: ArrayLike, y_pred: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Returns targets and predictions as arrays of one shape and one wide dtype.

    Args:
        name: The loss, for the error message.
        y_true: ``(batch, *rest)``.
        y_pred: ``(batch, *rest)``.

    Raises:
        ShapeError: The shapes differ.
        ArgumentTypeError: The values are complex.
    """
    true_shape, pred_shape = jnp.shape(y_true), jnp.shape(y_pred)
    if true_shape != pred_shape:
        # (batch, 1) and (batch,) would broadcast to (batch, batch) and give a wrong number.
        raise errors.ShapeError(
            f"{name}: y_true and y_pred must have the same shape, got y_true {true_shape} and "
            f"y_pred {pred_shape}",
            fix="make them equal: squeeze a trailing axis of length 1 (y_pred[:, 0]) or add one "
            "(y_true[:, None])",
        )
    targets, predictions = same_dtype(y_true, y_pred)
    return targets, predictions


def trailing_mean(values: jax.Array) -> jax.Array:
    """Returns the mean over all axes but the first."""
    return values if values.ndim <= 1 else jnp.mean(values, axis=tuple(range(1, values.ndim)))
