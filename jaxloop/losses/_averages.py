"""The averages of a loss: over the axes of one example, and over the examples of a batch.

    values = per_example(loss_values, num_examples)         # (batch,)
    scalar = reduce(values, sample_weight, num_examples)
    scalar = average(loss, y_true, y_pred, sample_weight, num_examples)

Weights of several axes, such as one for each token, make each element an example.

Invariant: an example of weight 0 is not there. It adds nothing to the value, even if its loss is
NaN or infinite. With `average`, it adds nothing to the gradient either.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.losses._loss import Loss
from jaxloop.losses._shapes import as_float, flattened, trailing_mean, widened


def per_example(values: ArrayLike, num_examples: int) -> jax.Array:
    """Returns one value per example: the mean over all axes but the first.

    Args:
        values: ``(batch, *rest)``, or a scalar, which is returned unchanged.
        num_examples: The length of the batch axis.

    Returns:
        ``(batch,)``, or the scalar, in float32 or wider.

    Raises:
        ShapeError: The first axis of ``values`` is not the batch axis.

    Example:
        >>> import jax.numpy as jnp
        >>> per_example(jnp.array([[1.0, 3.0]]), 1).tolist()
        [2.0]
    """
    array = as_float(values)
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

    The sum is computed in float32, or in float64 if the loss or the weights are float64. Examples
    of weight 0 add nothing, even if their loss is NaN. If all weights are 0, the result is 0.

    The gradient of an example of weight 0 is 0 with respect to its loss. If the derivative of that
    loss is infinite or NaN, the product is NaN. `average` prevents this.

    Args:
        loss_value: ``(batch, *rest)`` or a scalar.
        sample_weight: ``(batch,)``, or any leading part of the shape of ``loss_value``, such as
            ``(batch, time)``, of bool, int or float. Each element of it counts as an example. None
            weights all examples equally.
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
    if sample_weight is not None and jnp.ndim(sample_weight) > 1:
        (loss_value,), sample_weight = _examples((loss_value,), sample_weight, "the loss's values")
        num_examples = sample_weight.shape[0]
    values = per_example(loss_value, num_examples)
    if sample_weight is None:
        return values if values.ndim == 0 else jnp.mean(values)
    if values.ndim == 0:
        raise errors.ShapeError(
            "a loss must return one value per example when the batch has sample weights or a "
            "mask, got a scalar",
            fix="return one value per example",
        )
    weight = _checked(sample_weight, num_examples)
    wide = jnp.float64 in (values.dtype, weight.dtype)
    weight = weight.astype(jnp.float64 if wide else values.dtype)
    present = weight != 0
    # The losses are replaced before the product too, because infinity times 0 is NaN.
    values = jnp.where(present, values.astype(weight.dtype), 0)
    total = jnp.sum(jnp.where(present, values * weight, 0))
    norm = jnp.sum(weight)
    return jnp.where(norm == 0, 0, total / jnp.where(norm == 0, 1, norm))


def average(
    loss: Loss,
    y_true: PyTree,
    y_pred: PyTree,
    sample_weight: ArrayLike | None,
    num_examples: int,
) -> jax.Array:
    """Returns the weighted average of a loss over the examples, computed in float32 or wider.

    Targets and predictions in float16 or bfloat16 reach the loss as float32. Those of examples of
    weight 0 are replaced by 0.5 (integers by 0) before the loss sees them, so neither the value nor
    the gradient depends on them.

    Args:
        loss: The loss.
        y_true: The targets, a pytree of arrays with a leading batch axis.
        y_pred: The predictions.
        sample_weight: ``(batch,)``, or any leading part of the shape of the targets, such as
            ``(batch, time)``, of bool, int or float. Each element of it counts as an example, so
            the loss gets targets and predictions with these axes as one. None weights all examples
            equally.
        num_examples: The length of the batch axis.

    Returns:
        A scalar.

    Raises:
        ShapeError: The loss is a scalar and the batch has weights, or a shape does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxloop import losses
        >>> loss = losses.get(lambda y_true, y_pred: 1 / y_pred)
        >>> y, weight = jnp.array([2.0, 0.0]), jnp.array([1.0, 0.0])
        >>> jax.grad(lambda p: average(loss, y, p, weight, 2))(y).tolist()
        [-0.25, 0.0]
    """
    y_true, y_pred = widened(y_true), widened(y_pred)
    if sample_weight is not None and jnp.ndim(sample_weight) > 1:
        y_true, weight = _examples(y_true, sample_weight, "the target")
        y_pred = flattened(y_pred, jnp.shape(sample_weight))
        sample_weight, num_examples = weight, weight.shape[0]
    if sample_weight is not None:
        present = _checked(sample_weight, num_examples).astype(jnp.bool_)
        y_true, y_pred = jax.tree.map(lambda leaf: _where(present, leaf), (y_true, y_pred))
    return reduce(loss.fn(y_true, y_pred), sample_weight, num_examples)


def _examples(
    values: PyTree, sample_weight: ArrayLike | None, name: str
) -> tuple[PyTree, jax.Array]:
    """Returns values and weights whose leading axes, those of the weights, are one axis."""
    weight = jnp.asarray(sample_weight)
    for leaf in jax.tree.leaves(values):
        if jnp.shape(leaf)[: weight.ndim] != weight.shape:
            raise errors.ShapeError(
                f"sample_weight must have a leading part of the shape of {name} "
                f"{jnp.shape(leaf)}, got {weight.shape}",
                fix="pass weights of shape (batch,) or, for one per element, (batch, time)",
            )
    return flattened(values, weight.shape), weight.reshape(-1)


def _checked(sample_weight: ArrayLike, num_examples: int) -> jax.Array:
    weight = jnp.asarray(sample_weight)
    if weight.shape != (num_examples,):
        raise errors.ShapeError(
            f"sample_weight must have shape ({num_examples},), got {weight.shape}",
            fix="pass one weight per example",
        )
    return weight


def _where(present: jax.Array, leaf: PyTree) -> PyTree:
    """Returns an array with a harmless number in the rows that are not present."""
    array = jnp.asarray(leaf)
    if array.shape[:1] != present.shape or not jnp.issubdtype(array.dtype, jnp.number):
        return leaf
    # 0.5 is a probability, a logit and a distance, and has a logarithm. 0 is a class.
    harmless = 0.5 if jnp.issubdtype(array.dtype, jnp.inexact) else 0
    return jnp.where(present.reshape(-1, *(1,) * (array.ndim - 1)), array, harmless)
