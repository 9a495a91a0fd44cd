"""The built-in losses, with the same definitions as in Axon.

    value = mean_squared_error(y_true, y_pred)

Invariant: every loss returns one value per example, ``(batch,)``, in float32 or wider, and never
broadcasts targets against predictions.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop.losses._labels import class_numbers, nan_unless, sparse_labels, zero_or_one
from jaxloop.losses._shapes import as_float, same_dtype, same_shape, trailing_mean

_EPS = 1e-7


def _clip(values: jax.Array, low: float, high: float) -> jax.Array:
    # `jnp.clip` halves the gradient of a value that equals a bound, such as a probability of 1.
    return jnp.where(values > high, high, jnp.where(values < low, low, values))


def _times_log(y_true: jax.Array, log_p: jax.Array) -> jax.Array:
    """Returns ``y log p``, and 0 where ``y`` and ``p`` are both 0, as the limit is."""
    nothing = (y_true == 0) & jnp.isneginf(log_p)
    return y_true * jnp.where(nothing, 0, log_p)


def binary_cross_entropy(
    y_true: ArrayLike, y_pred: ArrayLike, *, from_logits: bool = False
) -> jax.Array:
    """Returns the mean of ``-(y log p + (1 - y) log(1 - p))`` for each example.

    Args:
        y_true: ``(batch, *rest)`` of 0 and 1. Floats may lie between them. An integer label that is
            neither 0 nor 1 gives NaN.
        y_pred: ``(batch, *rest)``, probabilities, or logits if ``from_logits``.
        from_logits: Whether ``y_pred`` holds logits, to which no sigmoid was applied.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.binary_cross_entropy`.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(binary_cross_entropy(jnp.array([1]), jnp.array([0.5]))[0]), 4)
        0.6931
    """
    valid = zero_or_one(y_true)
    y_true, y_pred = same_shape("binary_cross_entropy", y_true, y_pred)
    if from_logits:
        # The log sigmoid is accurate where a clipped probability is not.
        log_p, log_not_p = jax.nn.log_sigmoid(y_pred), jax.nn.log_sigmoid(-y_pred)
    else:
        # Clipped and shifted, as in Axon. 1 - p is clipped after the subtraction, which is exact
        # for p near 1, while a float32 cannot hold 1 - eps.
        p, not_p = _clip(y_pred, _EPS, 1 - _EPS), _clip(1 - y_pred, _EPS, 1 - _EPS)
        log_p, log_not_p = jnp.log(p + _EPS), jnp.log(not_p + _EPS)
    values = -(_times_log(y_true, log_p) + _times_log(1 - y_true, log_not_p))
    return trailing_mean(nan_unless(valid, values))


def categorical_cross_entropy(
    y_true: ArrayLike, y_pred: ArrayLike, *, from_logits: bool = False, sparse: bool = False
) -> jax.Array:
    """Returns ``-sum(y log p)`` over the classes, the last axis, for each example.

    Args:
        y_true: ``(batch, *rest, classes)``, or class numbers ``(batch, *rest)`` if ``sparse``. A
            class number below 0 or from ``classes`` on gives NaN.
        y_pred: ``(batch, *rest, classes)``, probabilities, or logits if ``from_logits``.
        from_logits: Whether ``y_pred`` holds logits, to which no softmax was applied.
        sparse: Whether ``y_true`` holds class numbers.

    Returns:
        ``(batch,)``, the mean over the axes between the first and the last.

    Raises:
        ShapeError: The shapes do not fit, or ``y_true`` holds class numbers without ``sparse``.
        ArgumentTypeError: With ``sparse``, ``y_true`` does not hold integers.

    Source: `Axon.Losses.categorical_cross_entropy`.

    Example:
        >>> import jax.numpy as jnp
        >>> p = jnp.array([[0.5, 0.5]])
        >>> round(float(categorical_cross_entropy(jnp.array([1]), p, sparse=True)[0]), 4)
        0.6931
    """
    name = "categorical_cross_entropy"
    y_pred = as_float(y_pred)
    valid: jax.Array | None = None
    if sparse:
        y_true = sparse_labels(name, y_true, y_pred)
        y_true, valid = class_numbers(name, y_true, y_pred.shape[-1])
    elif jnp.ndim(y_true) == y_pred.ndim - 1 and jnp.shape(y_true) == y_pred.shape[:-1]:
        raise errors.ShapeError(
            f"{name}: y_true must have the shape of y_pred, got y_true {jnp.shape(y_true)} (class "
            f"numbers?) and y_pred {y_pred.shape}",
            fix="pass sparse=True, one-hot encode the labels, or use "
            "optax.softmax_cross_entropy_with_integer_labels (which takes logits)",
        )
    else:
        y_true, y_pred = same_shape(name, y_true, y_pred)
    log_p = jax.nn.log_softmax(y_pred) if from_logits else jnp.log(_clip(y_pred, _EPS, 1))
    if valid is not None:
        values = -jnp.take_along_axis(log_p, y_true[..., None], axis=-1)[..., 0]
        return trailing_mean(nan_unless(valid, values))
    return trailing_mean(-jnp.sum(_times_log(y_true, log_p), axis=-1))


def categorical_hinge(y_true: ArrayLike, y_pred: ArrayLike) -> jax.Array:
    """Returns ``max(0, 1 + max((1 - y) p) - sum(y p))`` over the classes for each example.

    Args:
        y_true: ``(batch, *rest)``, one-hot along the last axis.
        y_pred: ``(batch, *rest)``.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.categorical_hinge`.
    """
    y_true, y_pred = same_shape("categorical_hinge", y_true, y_pred)
    negative = jnp.max((1 - y_true) * y_pred, axis=-1)
    positive = jnp.sum(y_true * y_pred, axis=-1)
    return trailing_mean(jnp.maximum(negative - positive + 1, 0))


def hinge(y_true: ArrayLike, y_pred: ArrayLike) -> jax.Array:
    """Returns the mean of ``max(0, 1 - y p)`` for each example.

    Args:
        y_true: ``(batch, *rest)`` of -1 and 1.
        y_pred: ``(batch, *rest)``.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.hinge`.
    """
    y_true, y_pred = same_shape("hinge", y_true, y_pred)
    return trailing_mean(jnp.maximum(1 - y_true * y_pred, 0))


def kl_divergence(y_true: ArrayLike, y_pred: ArrayLike) -> jax.Array:
    """Returns ``sum(y log(y / p))`` over the last axis for each example.

    Both are clipped to ``[1e-7, 1]``.

    Args:
        y_true: ``(batch, *rest)``, probabilities along the last axis.
        y_pred: ``(batch, *rest)``.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.kl_divergence`.
    """
    y_true, y_pred = same_shape("kl_divergence", y_true, y_pred)
    y_true, y_pred = _clip(y_true, _EPS, 1), _clip(y_pred, _EPS, 1)
    return trailing_mean(jnp.sum(y_true * jnp.log(y_true / y_pred), axis=-1))


def log_cosh(y_true: ArrayLike, y_pred: ArrayLike) -> jax.Array:
    """Returns the mean of ``log(cosh(p - y))`` for each example.

    Args:
        y_true: ``(batch, *rest)``.
        y_pred: ``(batch, *rest)``.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.log_cosh`, in forms that neither overflow nor cancel.

    Example:
        >>> import jax.numpy as jnp
        >>> f"{log_cosh(jnp.array([0.0]), jnp.array([1e-4]))[0]:.3g}"
        '5e-09'
    """
    y_true, y_pred = same_shape("log_cosh", y_true, y_pred)
    # cosh is even, and exp(-2|x|) cannot overflow.
    x = jnp.abs(y_pred - y_true)
    large = x + jnp.log1p(jnp.exp(-2 * x)) - jnp.log(jnp.asarray(2, x.dtype))
    # Near 0 that form subtracts log 2 from log 2. This one uses cosh**2 = 1 + sinh**2.
    is_small = x < 1
    small = 0.5 * jnp.log1p(jnp.square(jnp.sinh(jnp.where(is_small, x, 0))))
    return trailing_mean(jnp.where(is_small, small, large))


def mean_absolute_error(y_true: ArrayLike, y_pred: ArrayLike) -> jax.Array:
    """Returns the mean of ``|y - p|`` for each example.

    Args:
        y_true: ``(batch, *rest)``.
        y_pred: ``(batch, *rest)``.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.mean_absolute_error`.
    """
    y_true, y_pred = same_shape("mean_absolute_error", y_true, y_pred)
    return trailing_mean(jnp.abs(y_true - y_pred))


def mean_squared_error(y_true: ArrayLike, y_pred: ArrayLike) -> jax.Array:
    """Returns the mean of ``(y - p)**2`` for each example.

    Args:
        y_true: ``(batch, *rest)``.
        y_pred: ``(batch, *rest)``.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.mean_squared_error`.

    Example:
        >>> import jax.numpy as jnp
        >>> mean_squared_error(jnp.zeros((1, 2)), jnp.array([[1.0, 3.0]])).tolist()
        [5.0]
    """
    y_true, y_pred = same_shape("mean_squared_error", y_true, y_pred)
    return trailing_mean(jnp.square(y_true - y_pred))


def poisson(y_true: ArrayLike, y_pred: ArrayLike) -> jax.Array:
    """Returns the mean of ``p - y log(p + 1e-7)`` for each example.

    Args:
        y_true: ``(batch, *rest)``.
        y_pred: ``(batch, *rest)``.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.poisson`.
    """
    y_true, y_pred = same_shape("poisson", y_true, y_pred)
    return trailing_mean(y_pred - y_true * jnp.log(y_pred + _EPS))


def soft_margin(y_true: ArrayLike, y_pred: ArrayLike) -> jax.Array:
    """Returns the mean of ``log(1 + exp(-y p))`` for each example.

    Args:
        y_true: ``(batch, *rest)`` of -1 and 1.
        y_pred: ``(batch, *rest)``.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.soft_margin`. Axon sums over the batch axis. This function takes the mean
    of each example, so that weights and masks apply.
    """
    y_true, y_pred = same_shape("soft_margin", y_true, y_pred)
    return trailing_mean(jax.nn.softplus(-y_true * y_pred))


def huber(y_true: ArrayLike, y_pred: ArrayLike, *, delta: float = 1.0) -> jax.Array:
    """Returns the mean Huber loss for each example.

    It is ``d**2 / 2`` where ``d = |p - y| <= delta``, and ``delta (d - delta / 2)`` elsewhere.

    Args:
        y_true: ``(batch, *rest)``.
        y_pred: ``(batch, *rest)``.
        delta: The distance at which the square becomes a line.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.huber`.
    """
    y_true, y_pred = same_shape("huber", y_true, y_pred)
    distance = jnp.abs(y_pred - y_true)
    # This form never squares a large distance, whose overflow would make the gradient NaN.
    near = jnp.minimum(distance, delta)
    return trailing_mean(near * (distance - 0.5 * near))


def cosine_similarity(y_true: ArrayLike, y_pred: ArrayLike) -> jax.Array:
    """Returns the cosine of the angle between the last axes for each example.

    It grows with agreement, up to 1, so negate it to minimize it.

    Args:
        y_true: ``(batch, *rest)``.
        y_pred: ``(batch, *rest)``.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.cosine_similarity`.
    """
    y_true, y_pred = same_shape("cosine_similarity", y_true, y_pred)
    # The squares of squares below would overflow above 1e9, and vanish below 1e-9. Dividing by a
    # power of 2 changes no other bit of the quotient.
    scale_true, scale_pred = _power_of_two(y_true), _power_of_two(y_pred)
    y_true, y_pred = y_true / scale_true, y_pred / scale_pred
    dot = jnp.sum(y_true * y_pred, axis=-1)
    squares = jnp.sum(jnp.square(y_true), axis=-1) * jnp.sum(jnp.square(y_pred), axis=-1)
    least = jnp.square(1e-6 / scale_true / scale_pred)[..., 0]
    least = jnp.maximum(least, jnp.finfo(dot.dtype).tiny)
    # The maximum is inside the root, because the gradient of sqrt at 0 is infinite.
    return trailing_mean(dot / jnp.sqrt(jnp.maximum(squares, least)))


def _power_of_two(values: jax.Array) -> jax.Array:
    """Returns the power of 2 at or below the largest magnitude on the last axis, which stays."""
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(values)), axis=-1, keepdims=True, initial=0)
    usable = jnp.isfinite(largest) & (largest > 0)
    largest = jnp.where(usable, largest, 1)
    return largest / (2 * jnp.frexp(largest)[0])


def margin_ranking(
    y_true: ArrayLike, y_pred: Sequence[ArrayLike], *, margin: float = 0.0
) -> jax.Array:
    """Returns the mean of ``max(0, margin - y (p1 - p2))`` for each example.

    Args:
        y_true: ``(batch, *rest)``, 1 where the first should rank higher, and -1 where the second
            should.
        y_pred: A pair of arrays ``(batch, *rest)``.
        margin: The minimum difference between the two.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.margin_ranking`.
    """
    if not isinstance(y_pred, tuple | list) or len(y_pred) != 2:
        raise errors.ShapeError(
            f"margin_ranking: y_pred must be a pair of arrays, got {type(y_pred).__name__}",
            fix="return (scores_1, scores_2) from the model",
        )
    same_shape("margin_ranking", y_true, y_pred[0])
    same_shape("margin_ranking", y_true, y_pred[1])
    order, first, second = same_dtype(y_true, *y_pred)
    return trailing_mean(jnp.maximum(margin - order * (first - second), 0))
