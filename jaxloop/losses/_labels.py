"""Labels that are class numbers, and what happens to those that are not a class.

    labels, valid = class_numbers("multiclass_hinge_loss", y_true, num_classes)
    value = nan_unless(valid, loss(labels, y_pred))

Invariant: a label that is not a class gives NaN, in the loss and in its gradient. It never stands
for another class.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors


def class_numbers(name: str, y_true: ArrayLike, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Returns the labels with 0 in place of those that are not a class, and which ones are.

    Args:
        name: The loss, for the error message.
        y_true: Class numbers of any shape, integer or bool.
        num_classes: The number of classes.

    Returns:
        The labels, and a bool array of the same shape.

    Raises:
        ArgumentTypeError: The labels are not integers.
    """
    labels = jnp.asarray(y_true)
    if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == jnp.bool_):
        raise errors.ArgumentTypeError(
            f"{name}: y_true must be integer class numbers, got {labels.dtype}",
            fix="cast the labels to int32, or use a loss that takes one-hot labels",
        )
    # A uint8 cannot be compared with 300 classes, and a negative number must stay negative.
    labels = labels.astype(jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32)
    valid = (labels >= 0) & (labels < num_classes)
    return jnp.where(valid, labels, 0), valid


def sparse_labels(name: str, y_true: ArrayLike, y_pred: ArrayLike) -> jax.Array:
    """Returns class numbers in the shape of the predictions without the classes, the last axis.

    Raises:
        ShapeError: The labels have another shape.
    """
    labels, shape = jnp.asarray(y_true), jnp.shape(y_pred)
    if shape and labels.shape == (*shape[:-1], 1):
        labels = labels[..., 0]
    if not shape or labels.shape != shape[:-1]:
        raise errors.ShapeError(
            f"{name}: with sparse=True, y_true must have the shape of y_pred without its last "
            f"axis, got y_true {labels.shape} and y_pred {shape}",
            fix="pass one class number per example",
        )
    return labels


def zero_or_one(y_true: ArrayLike) -> jax.Array:
    """Returns which labels of a binary loss are valid. Floats may be anything, as soft labels."""
    labels = jnp.asarray(y_true)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return jnp.ones(labels.shape, jnp.bool_)
    return (labels == 0) | (labels == 1)


def nan_unless(valid: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the values with NaN where they are not valid.

    The product, unlike `jnp.where`, makes the gradient NaN too, so that a label out of range cannot
    train anything unnoticed.
    """
    # Without a NaN that is always there, which `jax.debug_nans` would report.
    one = valid.astype(values.dtype)
    return values * (one / one)
