"""Metrics: accumulators on the device, exact over the data set for any split into batches.

    metric = metrics.accuracy()
    acc = metric.update(metric.init(), y_true, y_pred, weight=mask)
    value = metric.compute(acc)

A `Metric` is an accumulator with its functions. Inside the package, ``declare`` turns what a user
passes to `Loop.metric` into a ``MetricSpec``, and ``bind`` turns the specs of a loop into its
``Metrics``.
"""

from __future__ import annotations

from jaxloop.metrics.classification import (
    accuracy,
    false_negatives,
    false_positives,
    precision,
    recall,
    sensitivity,
    specificity,
    top_k_categorical_accuracy,
    true_negatives,
    true_positives,
)
from jaxloop.metrics.collection import SKIPPED as SKIPPED
from jaxloop.metrics.confusion import confusion_matrix
from jaxloop.metrics.loss_metrics import of_loss
from jaxloop.metrics.metric import Metric, mean
from jaxloop.metrics.regression import mean_absolute_error, mean_squared_error

__all__ = [
    "Metric",
    "accuracy",
    "confusion_matrix",
    "false_negatives",
    "false_positives",
    "mean",
    "mean_absolute_error",
    "mean_squared_error",
    "of_loss",
    "precision",
    "recall",
    "sensitivity",
    "specificity",
    "top_k_categorical_accuracy",
    "true_negatives",
    "true_positives",
]
