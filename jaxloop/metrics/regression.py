"""Metrics of regression, and every loss as a metric: the mean of its per-example values.

    metric = mean_squared_error()
    metric = of_loss("huber")

Invariant: a metric has the name and the meaning of its loss.
"""

from __future__ import annotations

import functools
from typing import Any

from jaxloop import losses
from jaxloop.metrics import algebra
from jaxloop.metrics.algebra import Metric


@functools.cache
def mean_absolute_error() -> Metric:
    """The mean of ``|y_true - y_pred|`` over the data set."""
    return of_loss("mean_absolute_error")


@functools.cache
def mean_squared_error() -> Metric:
    """The mean of ``(y_true - y_pred)**2`` over the data set.

    Example:
        >>> import jax.numpy as jnp
        >>> m = mean_squared_error()
        >>> float(m.compute(m.update(m.init(), jnp.zeros(2), jnp.array([1.0, 3.0]))))
        5.0
    """
    return of_loss("mean_squared_error")


@functools.cache
def of_loss(name: str) -> Metric:
    """The mean over the data set of the loss of that name.

    Args:
        name: One of `losses.names`.

    Returns:
        A metric of ``(y_true, y_pred)``.

    Raises:
        UnknownNameError: No loss has this name.
    """
    loss = losses.get(name)

    def values(y_true: Any, y_pred: Any) -> Any:
        return loss.fn(y_true, y_pred)

    return algebra.mean(values, name=name)
