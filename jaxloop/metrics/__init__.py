"""Metrics: accumulators on the device, exact over the data set, whatever the batches.

metric = metrics.accuracy()
acc = metric.update(metric.init(), y_true, y_pred, weight=mask)
value = metric.compute(acc)
"""

from __future__ import annotations

from jaxloop.metrics.algebra import Metric, mean
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
from jaxloop.metrics.collection import Bound, Collection
from jaxloop.metrics.declare import Declared, declare, declare_batch_mean
from jaxloop.metrics.regression import mean_absolute_error, mean_squared_error, of_loss

__all__ = [
    "Bound",
    "Collection",
    "Declared",
    "Metric",
    "accuracy",
    "declare",
    "declare_batch_mean",
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
