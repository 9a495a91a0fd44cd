"""Metrics of regression, and every loss as a metric: the mean of its per-example values.

    metric = mean_squared_error()
    metric = of_loss("huber")

Invariant: such a metric has the name and the meaning of its loss.
"""

from __future__ import annotations

import functools

from jax.typing import ArrayLike

from jaxloop import losses
from jaxloop._core.types import PyTree
from jaxloop.metrics.metric import Metric, mean


@functools.cache
def mean_absolute_error() -> Metric:
    """Makes a metric: the mean of ``|y_true - y_pred|`` over the data set.

    Returns:
        A metric of ``(y_true, y_pred)``.

    Example:
        >>> import jax.numpy as jnp
        >>> m = mean_absolute_error()
        >>> float(m.compute(m.update(m.init(), jnp.zeros(2), jnp.array([1.0, 3.0]))))
        2.0
    """
    return of_loss("mean_absolute_error")


@functools.cache
def mean_squared_error() -> Metric:
    """Makes a metric: the mean of ``(y_true - y_pred)**2`` over the data set.

    Returns:
        A metric of ``(y_true, y_pred)``.

    Example:
        >>> import jax.numpy as jnp
        >>> m = mean_squared_error()
        >>> float(m.compute(m.update(m.init(), jnp.zeros(2), jnp.array([1.0, 3.0]))))
        5.0
    """
    return of_loss("mean_squared_error")


@functools.cache
def of_loss(name: str) -> Metric:
    """Makes a metric: the mean of a loss over the data set.

    Args:
        name: One of `losses.names`.

    Returns:
        A metric of ``(y_true, y_pred)``.

    Raises:
        UnknownNameError: No loss has this name.

    Example:
        >>> of_loss("huber").name
        'huber'
    """
    loss = losses.get(name)

    def values(y_true: PyTree, y_pred: PyTree) -> ArrayLike:
        return loss.fn(y_true, y_pred)

    return mean(values, name=name)
