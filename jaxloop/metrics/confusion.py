"""The confusion matrix: how often each class is predicted for each true class.

    loop = loop.metric(confusion_matrix(10))
    matrix = loop.run(data).history[0]["confusion_matrix"]     # (10, 10), np.int64

Invariant: without float weights, every cell is an exact integer for any split of the data.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop._core.checks import check_count
from jaxloop._core.types import PyTree
from jaxloop.metrics.classification import (
    _arrays,
    _class_numbers,
    _columns,
    _is_column,
    _is_nan,
    _positive,
    _same_class,
    _widened,
)
from jaxloop.metrics.exact_int import ExactInt, count_limbs, scatter_ints, zero_int
from jaxloop.metrics.exact_sum import Pair, scatter_floats, zero_pair
from jaxloop.metrics.metric import Metric, of_sums
from jaxloop.metrics.weights import check_weight, is_float_weight


@functools.cache
def confusion_matrix(num_classes: int, *, threshold: float = 0.5) -> Metric:
    """Makes a metric: how often each class was predicted for each true class.

    Row ``i``, column ``j`` of the matrix holds the number of examples of class ``i`` that were
    predicted as class ``j``. Labels and predictions are those of `accuracy`. An example does not
    count if its label is not a class, such as -1, or if one of its scores is NaN.

    Args:
        num_classes: The number of classes, at least 2.
        threshold: The probability above which a single column of predictions means class 1.

    Returns:
        A metric of ``(y_true, y_pred)``. Its value has shape ``(num_classes, num_classes)`` and
        consists of exact integers, ``np.int64`` in ``state.metrics``. With float weights, it
        consists of floats.

    Raises:
        ArgumentError: ``num_classes`` is less than 2.
        ArgumentTypeError: ``num_classes`` is not a whole number.

    Example:
        >>> import jax.numpy as jnp
        >>> m = confusion_matrix(2)
        >>> y_true, y_pred = jnp.array([0, 1, 1]), jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
        >>> m.compute(m.update(m.init(), y_true, y_pred)).to_numpy().tolist()
        [[1, 0], [1, 1]]
    """
    check_count("num_classes", num_classes, at_least=2, where="confusion_matrix")
    shape, name = (num_classes, num_classes), "confusion_matrix"
    num_cells = num_classes**2

    def cells(
        y_true: PyTree, y_pred: PyTree, weight: ArrayLike | None
    ) -> tuple[jax.Array, jax.Array | None]:
        labels, predicted = _classes(name, num_classes, threshold, y_true, y_pred)
        checked = check_weight(weight, labels.shape[0], name)
        if checked is not None:
            by_example = checked.reshape(checked.shape + (1,) * (labels.ndim - 1))
            checked = jnp.broadcast_to(by_example, labels.shape).reshape(-1)
        exists = (labels >= 0) & (predicted >= 0)
        return jnp.where(exists, labels * num_classes + predicted, num_cells).reshape(-1), checked

    def delta(y_true: PyTree, y_pred: PyTree, *, weight: ArrayLike | None = None) -> ExactInt:
        index, checked = cells(y_true, y_pred, weight)
        if checked is not None and is_float_weight(checked):
            raise errors.ArgumentTypeError(
                f"the weights of metric {name!r} must be bool or integer, got {checked.dtype}",
                fix=f"use {name}({num_classes}).weighted, or pass a bool or integer mask",
            )
        counts = scatter_ints(index, checked, num_cells, count_limbs())
        return jax.tree.map(lambda limb: limb.reshape(shape), counts)

    def delta_weighted(y_true: PyTree, y_pred: PyTree, *, weight: ArrayLike | None = None) -> Pair:
        index, checked = cells(y_true, y_pred, weight)
        if checked is None:
            checked = jnp.ones(index.shape, jnp.bool_)
        sums = scatter_floats(index, checked, num_cells)
        return Pair(*(part.reshape(shape) for part in sums))

    weighted = of_sums(lambda: zero_pair(shape), delta_weighted, lambda acc: acc.hi, name)
    return of_sums(
        lambda: zero_int(shape, num_limbs=count_limbs()),
        delta,
        lambda acc: acc,
        name,
        weighted=weighted,
    )


def _classes(
    name: str, num_classes: int, threshold: float, y_true: PyTree, y_pred: PyTree
) -> tuple[jax.Array, jax.Array]:
    """Returns the true and the predicted classes as int32, and -1 where there is none.

    Args:
        name: The metric, for the error message.
        num_classes: The number of classes.
        threshold: The probability above which a single column means class 1.
        y_true: See `accuracy`.
        y_pred: See `accuracy`.

    Raises:
        ShapeError: The shapes do not fit each other or the number of classes.
    """
    labels, scores = _arrays(name, y_true, y_pred)
    if _is_column(scores) and _is_column(labels):
        labels, scores = _columns(name, labels, scores)
        if jnp.issubdtype(scores.dtype, jnp.floating):
            predicted = (_widened(scores) > threshold).astype(jnp.int32)
            is_number = ~_is_nan(labels) & ~_is_nan(scores)
            label = _positive(labels).astype(jnp.int32)
            return jnp.where(is_number, label, -1), jnp.where(is_number, predicted, -1)
        return _in_range(labels, num_classes), _in_range(scores, num_classes)
    labels = _class_numbers(name, labels, scores)
    if scores.shape[-1] != num_classes:
        raise errors.ShapeError(
            f"metric {name!r}: y_pred must have num_classes={num_classes} scores per example, got "
            f"shape {scores.shape}",
            fix=f"pass num_classes={scores.shape[-1]}",
        )
    predicted = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    predicted = jnp.where(jnp.any(_is_nan(scores), axis=-1), -1, predicted)
    return _in_range(labels, num_classes), predicted


def _in_range(classes: jax.Array, num_classes: int) -> jax.Array:
    """Returns class numbers of any dtype as int32, and -1 for what is no class."""
    index = jnp.clip(classes.astype(jnp.int32), 0, num_classes - 1)
    return jnp.where(_same_class(classes, index), index, -1)
