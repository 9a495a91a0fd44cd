"""Metrics of regression: the losses of regression under the same names.

    metric = mean_squared_error()

Invariant: such a metric has the name and the meaning of its loss.
"""

from __future__ import annotations

import functools

from jaxloop.metrics.loss_metrics import of_loss
from jaxloop.metrics.metric import Metric


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
