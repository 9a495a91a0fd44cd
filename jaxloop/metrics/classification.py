"""Metrics of classification: accuracy, and the counts and ratios of binary predictions.

    metric = precision(threshold=0.7)
    acc = metric.update(metric.init(), y_true, y_pred)

Invariant: every value is computed from exact counts, so it does not depend, to the last bit, on how
the data are split into batches.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop.metrics.exact_sum import (
    Pair,
    add_pairs,
    divide_pairs,
    merge_pairs,
    sum_examples,
    sum_weights,
    zero_pair,
)
from jaxloop.metrics.metric import Metric, mean
from jaxloop.metrics.weights import check_weight, is_float_weight

# The cell of the confusion matrix for each name: (label, prediction).
_CELLS: dict[str, tuple[bool, bool]] = {
    "true_positives": (True, True),
    "false_positives": (False, True),
    "true_negatives": (False, False),
    "false_negatives": (True, False),
}


@functools.cache
def accuracy(*, threshold: float = 0.5) -> Metric:
    """Makes a metric: the fraction of examples whose class is predicted correctly.

    Labels are class numbers ``(batch, *rest)`` or one-hot ``(batch, *rest, classes)``, and
    predictions are scores ``(batch, *rest, classes)``. Alternatively, both are one column,
    ``(batch,)`` or ``(batch, 1)``. The prediction is then the probability of class 1, or the class
    itself if it is an integer.

    Args:
        threshold: The probability above which a single column predicts class 1.

    Returns:
        A metric of ``(y_true, y_pred)``.

    Example:
        >>> import jax.numpy as jnp
        >>> m = accuracy()
        >>> y_true, y_pred = jnp.array([0, 1]), jnp.array([[0.9, 0.1], [0.8, 0.2]])
        >>> float(m.compute(m.update(m.init(), y_true, y_pred)))
        0.5
    """

    def correct(y_true: ArrayLike, y_pred: ArrayLike) -> jax.Array:
        labels, scores = jnp.asarray(y_true), jnp.asarray(y_pred)
        if _is_column(scores) and _is_column(labels):
            labels, scores = _columns("accuracy", labels, scores)
            if jnp.issubdtype(scores.dtype, jnp.floating):
                return (scores > threshold) == _positive(labels)
            return jnp.equal(scores.astype(jnp.int32), labels.astype(jnp.int32))
        labels = _class_numbers("accuracy", labels, scores)
        return jnp.equal(jnp.argmax(scores, axis=-1).astype(jnp.int32), labels)

    return mean(correct, name="accuracy")


@functools.cache
def top_k_categorical_accuracy(*, k: int = 5) -> Metric:
    """Makes a metric: the fraction of examples whose class has one of the ``k`` highest scores.

    If scores are equal, the lower class number ranks first, so constant scores do not count as
    correct. If the score of the true class is NaN, the example counts as wrong.

    Args:
        k: The number of classes that count, at least 1.

    Returns:
        A metric of ``(y_true, y_pred)``, where ``y_true`` holds class numbers or one-hot labels and
        ``y_pred`` scores of shape ``(batch, *rest, classes)``.

    Raises:
        ArgumentError: ``k`` is not an int of at least 1.

    Example:
        >>> import jax.numpy as jnp
        >>> m = top_k_categorical_accuracy(k=2)
        >>> scores = jnp.array([[0.5, 0.3, 0.2]])
        >>> float(m.compute(m.update(m.init(), jnp.array([1]), scores)))
        1.0
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise errors.ArgumentError(
            f"top_k_categorical_accuracy: k must be an int of at least 1, got {k!r}",
            fix="pass a whole number such as k=5",
        )

    def correct(y_true: ArrayLike, y_pred: ArrayLike) -> jax.Array:
        labels, scores = jnp.asarray(y_true), jnp.asarray(y_pred)
        labels = _class_numbers("top_k_categorical_accuracy", labels, scores)
        num_classes = scores.shape[-1]
        exists = (labels >= 0) & (labels < num_classes)
        index = jnp.where(exists, labels, 0)[..., None]
        score = jnp.take_along_axis(scores, index, axis=-1)
        classes = jnp.arange(num_classes, dtype=jnp.int32).reshape((1,) * labels.ndim + (-1,))
        before = (scores > score) | ((scores == score) & (classes < index))
        rank = jnp.sum(before, axis=-1, dtype=jnp.int32)
        return exists & (rank < k) & (score[..., 0] == score[..., 0])

    return mean(correct, name="top_k_categorical_accuracy")


@functools.cache
def true_positives(*, threshold: float = 0.5) -> Metric:
    """Makes a metric: the number of positives predicted positive.

    The value is int32, or float32 with float weights.

    Args:
        threshold: The score above which a prediction is positive.

    Returns:
        A metric of ``(y_true, y_pred)``, both ``(batch,)`` or ``(batch, 1)``.
    """
    return _count("true_positives", threshold)


@functools.cache
def false_positives(*, threshold: float = 0.5) -> Metric:
    """Makes a metric: the number of negatives predicted positive.

    The value is int32, or float32 with float weights.

    Args:
        threshold: The score above which a prediction is positive.

    Returns:
        A metric of ``(y_true, y_pred)``, both ``(batch,)`` or ``(batch, 1)``.
    """
    return _count("false_positives", threshold)


@functools.cache
def true_negatives(*, threshold: float = 0.5) -> Metric:
    """Makes a metric: the number of negatives predicted negative.

    The value is int32, or float32 with float weights.

    Args:
        threshold: The score above which a prediction is positive.

    Returns:
        A metric of ``(y_true, y_pred)``, both ``(batch,)`` or ``(batch, 1)``.
    """
    return _count("true_negatives", threshold)


@functools.cache
def false_negatives(*, threshold: float = 0.5) -> Metric:
    """Makes a metric: the number of positives predicted negative.

    The value is int32, or float32 with float weights.

    Args:
        threshold: The score above which a prediction is positive.

    Returns:
        A metric of ``(y_true, y_pred)``, both ``(batch,)`` or ``(batch, 1)``.
    """
    return _count("false_negatives", threshold)


@functools.cache
def precision(*, threshold: float = 0.5) -> Metric:
    """Makes a metric: ``tp / (tp + fp)`` for binary predictions.

    The value is 0 if no example is predicted positive, and NaN before the first example.

    Args:
        threshold: The score above which a prediction is positive.

    Returns:
        A metric of ``(y_true, y_pred)``, both ``(batch,)`` or ``(batch, 1)``.
    """
    return _ratio("precision", "true_positives", "false_positives", threshold)


@functools.cache
def recall(*, threshold: float = 0.5) -> Metric:
    """Makes a metric: ``tp / (tp + fn)`` for binary predictions.

    The value is 0 if no example is positive, and NaN before the first example.

    Args:
        threshold: The score above which a prediction is positive.

    Returns:
        A metric of ``(y_true, y_pred)``, both ``(batch,)`` or ``(batch, 1)``.
    """
    return _ratio("recall", "true_positives", "false_negatives", threshold)


@functools.cache
def sensitivity(*, threshold: float = 0.5) -> Metric:
    """Makes the metric `recall` under another name.

    Args:
        threshold: The score above which a prediction is positive.

    Returns:
        A metric of ``(y_true, y_pred)``, both ``(batch,)`` or ``(batch, 1)``.
    """
    return _ratio("sensitivity", "true_positives", "false_negatives", threshold)


@functools.cache
def specificity(*, threshold: float = 0.5) -> Metric:
    """Makes a metric: ``tn / (tn + fp)`` for binary predictions.

    The value is 0 if no example is negative, and NaN before the first example.

    Args:
        threshold: The score above which a prediction is positive.

    Returns:
        A metric of ``(y_true, y_pred)``, both ``(batch,)`` or ``(batch, 1)``.
    """
    return _ratio("specificity", "true_negatives", "false_positives", threshold)


def _count(name: str, threshold: float) -> Metric:
    """Makes a count as an int32, and its float version for weights that are fractions.

    The dtype of the value must be known before the weights are, so these are two metrics. If the
    weights are float, `bind` uses `Metric.weighted`.
    """

    def update(
        acc: jax.Array, y_true: ArrayLike, y_pred: ArrayLike, *, weight: ArrayLike | None = None
    ) -> jax.Array:
        cell = _cell(name, name, y_true, y_pred, threshold)
        checked = check_weight(weight, cell.shape[0], name)
        if checked is not None and is_float_weight(checked):
            raise errors.ArgumentTypeError(
                f"the weights of metric {name!r}, an int32 count, must be bool or integer, got "
                f"{checked.dtype}",
                fix=f"use {name}().weighted, or pass a bool or integer mask",
            )
        if checked is None:
            return acc + jnp.sum(cell, dtype=jnp.int32)
        return acc + jnp.sum(jnp.where(cell, checked.astype(jnp.int32), 0), dtype=jnp.int32)

    def update_weighted(
        acc: Pair, y_true: ArrayLike, y_pred: ArrayLike, *, weight: ArrayLike | None = None
    ) -> Pair:
        cell = _cell(name, name, y_true, y_pred, threshold)
        checked = check_weight(weight, cell.shape[0], name)
        return add_pairs(acc, sum_examples(cell, checked))

    weighted = Metric(zero_pair, update_weighted, add_pairs, lambda acc: acc.hi, name)
    return Metric(
        lambda: jnp.zeros((), jnp.int32), update, jnp.add, lambda acc: acc, name, weighted
    )


def _ratio(name: str, numerator: str, rest: str, threshold: float) -> Metric:
    def init() -> dict[str, Pair]:
        return {name: zero_pair() for name in ("part", "whole", "seen")}

    def update(
        acc: dict[str, Pair],
        y_true: ArrayLike,
        y_pred: ArrayLike,
        *,
        weight: ArrayLike | None = None,
    ) -> dict[str, Pair]:
        part = _cell(name, numerator, y_true, y_pred, threshold)
        whole = part | _cell(name, rest, y_true, y_pred, threshold)
        checked = check_weight(weight, part.shape[0], name)
        new = {
            "part": sum_examples(part, checked),
            "whole": sum_examples(whole, checked),
            "seen": sum_weights(checked, part.shape[0]),
        }
        merged: dict[str, Pair] = merge_pairs(acc, new)
        return merged

    def compute(acc: dict[str, Pair]) -> jax.Array:
        value = divide_pairs(acc["part"], acc["whole"], 0.0)
        # With data, 0 / 0 is 0, as in scikit-learn. Without data, the value is NaN.
        return jnp.where(acc["seen"].hi == 0, jnp.nan, value)

    return Metric(init, update, merge_pairs, compute, name)


def _cell(
    name: str, cell: str, y_true: ArrayLike, y_pred: ArrayLike, threshold: float
) -> jax.Array:
    labels, scores = _columns(name, jnp.asarray(y_true), jnp.asarray(y_pred))
    label, prediction = _CELLS[cell]
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        scores = scores.astype(jnp.float32)
    predicted = scores > threshold
    return (_positive(labels) == label) & (predicted == prediction)


def _positive(y_true: jax.Array) -> jax.Array:
    if y_true.dtype == jnp.bool_:
        return y_true
    return y_true > (0.5 if jnp.issubdtype(y_true.dtype, jnp.floating) else 0)


def _is_column(array: jax.Array) -> bool:
    return array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1)


def _columns(name: str, y_true: jax.Array, y_pred: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two columns as ``(batch,)``, without a trailing axis of length 1."""
    if not _is_column(y_true) or not _is_column(y_pred) or y_true.shape[0] != y_pred.shape[0]:
        raise errors.ShapeError(
            f"metric {name!r}: y_true and y_pred must have shape (batch,) or (batch, 1), got "
            f"{y_true.shape} and {y_pred.shape}",
            fix="select one class first if the model predicts several",
        )
    return y_true.reshape(-1), y_pred.reshape(-1)


def _class_numbers(name: str, y_true: jax.Array, y_pred: jax.Array) -> jax.Array:
    """Returns the labels as int32 of the shape of ``y_pred`` without its last axis."""
    if y_pred.ndim >= 2:
        if y_true.shape == y_pred.shape:
            return jnp.argmax(y_true, axis=-1).astype(jnp.int32)
        if y_true.shape == (*y_pred.shape[:-1], 1):
            y_true = y_true[..., 0]
        if y_true.shape == y_pred.shape[:-1]:
            return y_true.astype(jnp.int32)
    raise errors.ShapeError(
        f"metric {name!r}: the shapes of y_true and y_pred must fit, got {y_true.shape} and "
        f"{y_pred.shape}",
        fix="pass class numbers (batch,) or one-hot labels (batch, classes), and predictions "
        "(batch, classes)",
    )
