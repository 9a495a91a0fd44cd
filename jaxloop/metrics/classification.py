"""Metrics of classification: accuracy, and the counts and ratios of binary predictions.

    metric = precision(threshold=0.7)
    acc = metric.update(metric.init(), y_true, y_pred)

Invariant: every value is computed from exact counts, so it does not depend, to the last bit, on how
the data are split into batches. If a prediction is NaN, it is not correct, and it is neither
positive nor negative.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop._core.types import Better, PyTree
from jaxloop.metrics.exact_int import ExactInt, count_limbs, is_x64, zero_int
from jaxloop.metrics.exact_sum import (
    Pair,
    divide_pairs,
    float_dtype,
    sum_weights,
    zero_pair,
)
from jaxloop.metrics.metric import Metric, mean, of_sums
from jaxloop.metrics.sums import Examples
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
    itself if it is an integer. An example is wrong if one of its scores is NaN, or if its label is
    no class, such as -1.

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

    def correct(y_true: PyTree, y_pred: PyTree) -> jax.Array:
        labels, scores = _arrays("accuracy", y_true, y_pred)
        if _is_column(scores) and _is_column(labels):
            labels, scores = _columns("accuracy", labels, scores)
            if jnp.issubdtype(scores.dtype, jnp.floating):
                positive = _widened(scores) > threshold
                return (positive == _positive(labels)) & ~_is_nan(labels) & ~_is_nan(scores)
            return _same_class(labels, scores)
        labels = _class_numbers("accuracy", labels, scores)
        predicted = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        return _same_class(labels, predicted) & ~jnp.any(_is_nan(scores), axis=-1)

    return mean(correct, name="accuracy", better="max")


@functools.cache
def top_k_categorical_accuracy(*, k: int = 5) -> Metric:
    """Makes a metric: the fraction of examples whose class has one of the ``k`` highest scores.

    If scores are equal, the lower class number ranks first, so constant scores do not count as
    correct. An example is wrong if one of its scores is NaN, or if its label is no class.

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

    def correct(y_true: PyTree, y_pred: PyTree) -> jax.Array:
        labels, scores = _arrays("top_k_categorical_accuracy", y_true, y_pred)
        labels = _class_numbers("top_k_categorical_accuracy", labels, scores)
        num_classes = scores.shape[-1]
        index = jnp.clip(labels.astype(jnp.int32), 0, num_classes - 1)
        exists = _same_class(labels, index)
        index = index[..., None]
        score = jnp.take_along_axis(scores, index, axis=-1)
        classes = jnp.arange(num_classes, dtype=jnp.int32).reshape((1,) * labels.ndim + (-1,))
        before = (scores > score) | ((scores == score) & (classes < index))
        rank = jnp.sum(before, axis=-1, dtype=jnp.int32)
        return exists & (rank < k) & ~jnp.any(_is_nan(scores), axis=-1)

    return mean(correct, name="top_k_categorical_accuracy", better="max")


@functools.cache
def true_positives(*, threshold: float = 0.5) -> Metric:
    """Makes a metric: the number of positives predicted positive.

    It is an exact integer, an ``np.int64`` in ``state.metrics``. With float weights, it is a float.

    Args:
        threshold: The score above which a prediction is positive.

    Returns:
        A metric of ``(y_true, y_pred)``, both ``(batch,)`` or ``(batch, 1)``.
    """
    return _count("true_positives", threshold)


@functools.cache
def false_positives(*, threshold: float = 0.5) -> Metric:
    """Makes a metric: the number of negatives predicted positive.

    It is an exact integer, an ``np.int64`` in ``state.metrics``. With float weights, it is a float.

    Args:
        threshold: The score above which a prediction is positive.

    Returns:
        A metric of ``(y_true, y_pred)``, both ``(batch,)`` or ``(batch, 1)``.
    """
    return _count("false_positives", threshold)


@functools.cache
def true_negatives(*, threshold: float = 0.5) -> Metric:
    """Makes a metric: the number of negatives predicted negative.

    It is an exact integer, an ``np.int64`` in ``state.metrics``. With float weights, it is a float.

    Args:
        threshold: The score above which a prediction is positive.

    Returns:
        A metric of ``(y_true, y_pred)``, both ``(batch,)`` or ``(batch, 1)``.
    """
    return _count("true_negatives", threshold)


@functools.cache
def false_negatives(*, threshold: float = 0.5) -> Metric:
    """Makes a metric: the number of positives predicted negative.

    It is an exact integer, an ``np.int64`` in ``state.metrics``. With float weights, it is a float.

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
    """Makes a count as an exact integer, and its float version for weights that are fractions.

    The dtype of the value must be known before the weights are, so these are two metrics. If the
    weights are float, `bind` uses `Metric.weighted`.
    """

    def delta(y_true: PyTree, y_pred: PyTree, *, weight: ArrayLike | None = None) -> Examples:
        cell = _cell(name, name, y_true, y_pred, threshold)
        checked = check_weight(weight, cell.shape[0], name)
        if checked is not None and is_float_weight(checked):
            raise errors.ArgumentTypeError(
                f"the weights of metric {name!r}, a count, must be bool or integer, got "
                f"{checked.dtype}",
                fix=f"use {name}().weighted, or pass a bool or integer mask",
            )
        return Examples(cell, checked)

    def delta_weighted(
        y_true: PyTree, y_pred: PyTree, *, weight: ArrayLike | None = None
    ) -> Examples:
        cell = _cell(name, name, y_true, y_pred, threshold)
        return Examples(cell, check_weight(weight, cell.shape[0], name))

    def init() -> ExactInt:
        return zero_int(num_limbs=count_limbs())

    weighted = of_sums(zero_pair, delta_weighted, lambda acc: acc.hi, name)
    better: Better = "max" if name.startswith("true_") else "min"
    return of_sums(init, delta, lambda acc: acc, name, weighted=weighted, better=better)


def _ratio(name: str, numerator: str, rest: str, threshold: float) -> Metric:
    def init() -> dict[str, Pair]:
        return {name: zero_pair() for name in ("part", "whole", "seen")}

    def delta(
        y_true: PyTree, y_pred: PyTree, *, weight: ArrayLike | None = None
    ) -> dict[str, PyTree]:
        part = _cell(name, numerator, y_true, y_pred, threshold)
        whole = part | _cell(name, rest, y_true, y_pred, threshold)
        checked = check_weight(weight, part.shape[0], name)
        return {
            "part": Examples(part, checked),
            "whole": Examples(whole, checked),
            "seen": sum_weights(checked, part.shape[0]),
        }

    def compute(acc: dict[str, Pair]) -> jax.Array:
        value = divide_pairs(acc["part"], acc["whole"], 0.0)
        # With data, 0 / 0 is 0, as in scikit-learn. Without data, the value is NaN.
        return jnp.where(acc["seen"].hi == 0, jnp.nan, value)

    return of_sums(init, delta, compute, name, better="max")


def _cell(name: str, cell: str, y_true: PyTree, y_pred: PyTree, threshold: float) -> jax.Array:
    labels, scores = _columns(name, *_arrays(name, y_true, y_pred))
    label, prediction = _CELLS[cell]
    predicted = _widened(scores) > threshold
    in_cell = (_positive(labels) == label) & (predicted == prediction)
    return in_cell & ~_is_nan(labels) & ~_is_nan(scores)


def _arrays(name: str, y_true: PyTree, y_pred: PyTree) -> tuple[jax.Array, jax.Array]:
    """Returns targets and predictions as arrays, and raises if they are several."""
    for which, value in (("y_true", y_true), ("y_pred", y_pred)):
        if not jax.tree_util.all_leaves([value]):
            raise errors.ShapeError(
                f"metric {name!r}: {which} must be one array, got a {type(value).__name__} of "
                f"{len(jax.tree.leaves(value))}",
                fix="select one with transform_or_fields=lambda named: [named['y_true'][...], "
                f"named['y_pred'][...]], or pass the name {name!r} to evaluate each output",
            )
    return jnp.asarray(y_true), jnp.asarray(y_pred)


def _positive(y_true: jax.Array) -> jax.Array:
    if y_true.dtype == jnp.bool_:
        return y_true
    return y_true > (0.5 if jnp.issubdtype(y_true.dtype, jnp.floating) else 0)


def _is_nan(values: jax.Array) -> jax.Array:
    if jnp.issubdtype(values.dtype, jnp.floating):
        return jnp.isnan(values)
    return jnp.zeros(values.shape, jnp.bool_)


def _widened(scores: jax.Array) -> jax.Array:
    # A threshold such as 0.3 would be rounded to the dtype of half-precision scores.
    wide = scores.dtype == jnp.float64
    return scores.astype(jnp.float64 if wide else float_dtype())


def _same_class(labels: jax.Array, predicted: jax.Array) -> jax.Array:
    """Compares class numbers of any dtypes. No cast wraps, and a fraction is no class."""
    labels, predicted = _without_bools(labels), _without_bools(predicted)
    if labels.dtype == predicted.dtype:
        return labels == predicted
    if any(jnp.issubdtype(x.dtype, jnp.floating) for x in (labels, predicted)):
        return _widened(labels) == _widened(predicted)
    wide = jnp.uint64 if is_x64() else jnp.uint32
    # Equal bits mean equal numbers, unless only one of them can be negative.
    same = labels.astype(wide) == predicted.astype(wide)
    return same & ((labels < 0) == (predicted < 0))


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


def _without_bools(array: jax.Array) -> jax.Array:
    return array.astype(jnp.int32) if array.dtype == jnp.bool_ else array


def _class_numbers(name: str, y_true: jax.Array, y_pred: jax.Array) -> jax.Array:
    """Returns the labels in the shape of ``y_pred`` without its last axis; -1 if there is none."""
    if y_pred.ndim >= 2:
        if y_true.shape == y_pred.shape:
            label = jnp.argmax(y_true, axis=-1).astype(jnp.int32)
            return jnp.where(jnp.any(_is_nan(y_true), axis=-1), -1, label)
        if y_true.shape == (*y_pred.shape[:-1], 1):
            return y_true[..., 0]
        if y_true.shape == y_pred.shape[:-1]:
            return y_true
    raise errors.ShapeError(
        f"metric {name!r}: the shapes of y_true and y_pred must fit, got {y_true.shape} and "
        f"{y_pred.shape}",
        fix="pass class numbers (batch,) or one-hot labels (batch, classes), and predictions "
        "(batch, classes)",
    )
