"""Metrics of classification: accuracy, and the counts and ratios of binary predictions.

    metric = precision(threshold=0.7)
    acc = metric.update(metric.init(), y_true, y_pred)

Invariant: every number is made of counts, which are exact, so it does not depend on how the data
were split, to the last bit.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxloop import errors
from jaxloop.metrics import algebra
from jaxloop.metrics.algebra import Metric

# Which cells of the confusion matrix a name means: (label, prediction).
_CELLS: dict[str, tuple[bool, bool]] = {
    "true_positives": (True, True),
    "false_positives": (False, True),
    "true_negatives": (False, False),
    "false_negatives": (True, False),
}


@functools.cache
def accuracy(*, threshold: float = 0.5) -> Metric:
    """The share of examples whose class is predicted.

    Labels are class numbers ``(batch, *rest)`` or one-hot ``(batch, *rest, classes)``, predictions
    scores ``(batch, *rest, classes)``; or both are one column, ``(batch,)`` or ``(batch, 1)``, and
    the prediction is a probability (an integer prediction is a class, and is compared).

    Args:
        threshold: From where a single column means the class 1.

    Returns:
        A metric of ``(y_true, y_pred)``.

    Example:
        >>> import jax.numpy as jnp
        >>> m = accuracy()
        >>> y_true, y_pred = jnp.array([0, 1]), jnp.array([[0.9, 0.1], [0.8, 0.2]])
        >>> float(m.compute(m.update(m.init(), y_true, y_pred)))
        0.5
    """

    def correct(y_true: Any, y_pred: Any) -> Any:
        y_true, y_pred = jnp.asarray(y_true), jnp.asarray(y_pred)
        if _is_column(y_pred) and _is_column(y_true):
            y_true, y_pred = _columns("accuracy", y_true, y_pred)
            if jnp.issubdtype(y_pred.dtype, jnp.floating):
                return (y_pred > threshold) == _positive(y_true)
            return jnp.equal(y_pred.astype(jnp.int32), y_true.astype(jnp.int32))
        labels = _class_numbers("accuracy", y_true, y_pred)
        return jnp.equal(jnp.argmax(y_pred, axis=-1).astype(jnp.int32), labels)

    return algebra.mean(correct, name="accuracy")


@functools.cache
def top_k_categorical_accuracy(*, k: int = 5) -> Metric:
    """The share of examples whose class is among the ``k`` with the highest scores.

    Of equal scores the lower class number ranks first, so constant scores are no success. A NaN
    score of the true class is a miss.

    Args:
        k: How many classes count, at least 1.

    Returns:
        A metric of ``(y_true, y_pred)``: class numbers or one-hot, and ``(batch, *rest, classes)``.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise errors.ArgumentError(
            f"top_k_categorical_accuracy: k must be an int of at least 1, got {k!r}",
            fix="pass for example k=5",
        )

    def correct(y_true: Any, y_pred: Any) -> Any:
        y_true, y_pred = jnp.asarray(y_true), jnp.asarray(y_pred)
        labels = _class_numbers("top_k_categorical_accuracy", y_true, y_pred)
        num_classes = y_pred.shape[-1]
        exists = (labels >= 0) & (labels < num_classes)
        index = jnp.where(exists, labels, 0)[..., None]
        score = jnp.take_along_axis(y_pred, index, axis=-1)
        classes = jnp.arange(num_classes, dtype=jnp.int32).reshape((1,) * labels.ndim + (-1,))
        before = (y_pred > score) | ((y_pred == score) & (classes < index))
        rank = jnp.sum(before, axis=-1, dtype=jnp.int32)
        return exists & (rank < k) & (score[..., 0] == score[..., 0])

    return algebra.mean(correct, name="top_k_categorical_accuracy")


@functools.cache
def true_positives(*, threshold: float = 0.5) -> Metric:
    """The number of positives predicted positive; int32, float32 under float weights."""
    return _count("true_positives", threshold)


@functools.cache
def false_positives(*, threshold: float = 0.5) -> Metric:
    """The number of negatives predicted positive; int32, float32 under float weights."""
    return _count("false_positives", threshold)


@functools.cache
def true_negatives(*, threshold: float = 0.5) -> Metric:
    """The number of negatives predicted negative; int32, float32 under float weights."""
    return _count("true_negatives", threshold)


@functools.cache
def false_negatives(*, threshold: float = 0.5) -> Metric:
    """The number of positives predicted negative; int32, float32 under float weights."""
    return _count("false_negatives", threshold)


@functools.cache
def precision(*, threshold: float = 0.5) -> Metric:
    """``tp / (tp + fp)`` of binary predictions, 0 where nothing was predicted positive."""
    return _ratio("precision", "true_positives", "false_positives", threshold)


@functools.cache
def recall(*, threshold: float = 0.5) -> Metric:
    """``tp / (tp + fn)`` of binary predictions, 0 where nothing is positive."""
    return _ratio("recall", "true_positives", "false_negatives", threshold)


@functools.cache
def sensitivity(*, threshold: float = 0.5) -> Metric:
    """The `recall`, under its other name."""
    return _ratio("sensitivity", "true_positives", "false_negatives", threshold)


@functools.cache
def specificity(*, threshold: float = 0.5) -> Metric:
    """``tn / (tn + fp)`` of binary predictions, 0 where nothing is negative."""
    return _ratio("specificity", "true_negatives", "false_positives", threshold)


def _count(name: str, threshold: float) -> Metric:
    """A count, as an int32 that cannot lose one, and its float form for weights that are fractions.

    The dtype of a value must be known before the weights are, so these are two metrics; who binds
    a metric to its outputs takes `Metric.weighted` where the weights are float.
    """

    def update(acc: jax.Array, y_true: Any, y_pred: Any, *, weight: Any = None) -> jax.Array:
        cell = _cell(name, name, y_true, y_pred, threshold)
        weight = algebra.check_weight(weight, cell.shape[0], name)
        if algebra.is_float_weight(weight):
            raise errors.ArgumentTypeError(
                f"metric {name!r} counts in int32, and the weights are {weight.dtype}",
                fix=f"use {name}().weighted, or pass a bool or integer mask",
            )
        if weight is None:
            return acc + jnp.sum(cell, dtype=jnp.int32)
        return acc + jnp.sum(jnp.where(cell, weight.astype(jnp.int32), 0), dtype=jnp.int32)

    def update_weighted(acc: Any, y_true: Any, y_pred: Any, *, weight: Any = None) -> Any:
        cell = _cell(name, name, y_true, y_pred, threshold)
        weight = algebra.check_weight(weight, cell.shape[0], name)
        return algebra.add_pairs(acc, algebra.sum_examples(cell, weight))

    weighted = Metric(
        algebra.zero_pair, update_weighted, algebra.add_pairs, lambda acc: acc.hi, name
    )
    return Metric(
        lambda: jnp.zeros((), jnp.int32), update, jnp.add, lambda acc: acc, name, weighted
    )


def _ratio(name: str, numerator: str, rest: str, threshold: float) -> Metric:
    def init() -> dict[str, algebra.Pair]:
        return {name: algebra.zero_pair() for name in ("part", "whole", "seen")}

    def update(acc: Any, y_true: Any, y_pred: Any, *, weight: Any = None) -> Any:
        part = _cell(name, numerator, y_true, y_pred, threshold)
        whole = part | _cell(name, rest, y_true, y_pred, threshold)
        weight = algebra.check_weight(weight, part.shape[0], name)
        new = {
            "part": algebra.sum_examples(part, weight),
            "whole": algebra.sum_examples(whole, weight),
            "seen": algebra.sum_weights(weight, part.shape[0]),
        }
        return algebra.merge_pairs(acc, new)

    def compute(acc: Any) -> jax.Array:
        value = algebra.divide_pairs(acc["part"], acc["whole"], 0.0)
        # 0 / 0 of data that were seen is 0, as scikit-learn has it; without data there is no value.
        return jnp.where(acc["seen"].hi == 0, jnp.nan, value)

    return Metric(init, update, algebra.merge_pairs, compute, name)


def _cell(name: str, cell: str, y_true: Any, y_pred: Any, threshold: float) -> Any:
    y_true, y_pred = _columns(name, jnp.asarray(y_true), jnp.asarray(y_pred))
    label, prediction = _CELLS[cell]
    if not jnp.issubdtype(y_pred.dtype, jnp.floating):
        y_pred = y_pred.astype(jnp.float32)
    predicted = y_pred > threshold
    return (_positive(y_true) == label) & (predicted == prediction)


def _positive(y_true: jax.Array) -> jax.Array:
    if y_true.dtype == jnp.bool_:
        return y_true
    return y_true > (0.5 if jnp.issubdtype(y_true.dtype, jnp.floating) else 0)


def _is_column(array: jax.Array) -> bool:
    return array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1)


def _columns(name: str, y_true: jax.Array, y_pred: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two columns as ``(batch,)``; a trailing axis of length 1 says nothing and goes."""
    if not _is_column(y_true) or not _is_column(y_pred) or y_true.shape[0] != y_pred.shape[0]:
        raise errors.ShapeError(
            f"metric {name!r}: y_true has shape {y_true.shape} and y_pred {y_pred.shape}",
            fix="binary labels and probabilities are (batch,) or (batch, 1); select one class of "
            "several first",
        )
    return y_true.reshape(-1), y_pred.reshape(-1)


def _class_numbers(name: str, y_true: jax.Array, y_pred: jax.Array) -> jax.Array:
    """The labels as int32 of the shape of ``y_pred`` without its last axis."""
    if y_pred.ndim >= 2:
        if y_true.shape == y_pred.shape:
            return jnp.argmax(y_true, axis=-1).astype(jnp.int32)
        if y_true.shape == (*y_pred.shape[:-1], 1):
            y_true = y_true[..., 0]
        if y_true.shape == y_pred.shape[:-1]:
            return y_true.astype(jnp.int32)
    raise errors.ShapeError(
        f"metric {name!r}: y_true has shape {y_true.shape} and y_pred {y_pred.shape}",
        fix="labels are class numbers (batch,) or one-hot (batch, classes), and predictions "
        "(batch, classes)",
    )
