"""What a user says of a metric, checked as far as it can be without data.

    declared = declare("accuracy")
    declared = declare(my_fn, "norm", "running_max", ("gradients",))

Invariant: a `Declared` is hashable, and equal declarations are equal, so that it can be the key of
a compiled step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxloop import errors, losses
from jaxloop.metrics import accumulate as accumulate_lib
from jaxloop.metrics import classification, regression
from jaxloop.metrics.algebra import Metric

Fields = tuple[str, ...] | Callable[[Any], Any]
Accumulate = None | str | Callable[[Any, Any, Any], Any]

DEFAULT_FIELDS = ("y_true", "y_pred")

_BUILT_INS: dict[str, Callable[[], Metric]] = {
    "accuracy": classification.accuracy,
    "false_negatives": classification.false_negatives,
    "false_positives": classification.false_positives,
    "mean_absolute_error": regression.mean_absolute_error,
    "mean_squared_error": regression.mean_squared_error,
    "precision": classification.precision,
    "recall": classification.recall,
    "sensitivity": classification.sensitivity,
    "specificity": classification.specificity,
    "top_k_categorical_accuracy": classification.top_k_categorical_accuracy,
    "true_negatives": classification.true_negatives,
    "true_positives": classification.true_positives,
}


@dataclass(frozen=True)
class Declared:
    """A metric as it was declared.

    Attributes:
        name: Its key in the results.
        metric: A name, a `Metric`, a function or a class with the CLU protocol.
        accumulate: None, one of ``accumulate.NAMES``, or ``(acc, obs, i) -> acc``.
        fields: Names, or a function of outputs and step state merged.
        batch_mean: Whether the field is a scalar that is its batch's weighted mean already.
    """

    name: str
    metric: Any
    accumulate: Accumulate = None
    fields: Fields = DEFAULT_FIELDS
    batch_mean: bool = False


def names() -> tuple[str, ...]:
    """The names of all metrics, sorted."""
    return tuple(sorted({*_BUILT_INS, *losses.names()}))


def built_in(name: str) -> Metric:
    """The metric of that name, with its defaults.

    Raises:
        UnknownNameError: No metric has this name.
    """
    if name in _BUILT_INS:
        return _BUILT_INS[name]()
    if name in losses.names():
        return regression.of_loss(name)
    raise errors.unknown_name("metric", name, names())


def declare(
    metric: Any,
    name: str | None = None,
    accumulate: Accumulate = None,
    transform_or_fields: Any = DEFAULT_FIELDS,
) -> Declared:
    """A declared metric; every error that needs no data is raised here.

    Args:
        metric: A built-in's name, a `Metric`, a function of the extracted values, or a class with
            ``from_model_output``, ``merge`` and ``compute``.
        name: Its key in the results; by default the metric's own name.
        accumulate: None (the metric's own; a function is averaged), ``"running_average"``,
            ``"running_sum"``, ``"running_min"``, ``"running_max"``, ``"last"``, or
            ``(acc, obs, i) -> acc``.
        transform_or_fields: Names of outputs (else of the step state), or a function of both
            merged that returns the list of arguments.

    Returns:
        The declaration.

    Raises:
        UnknownNameError: ``metric`` or ``accumulate`` is a name that is none.
        ArgumentTypeError: An argument is of the wrong type.
        ArgumentError: The metric has no usable name.

    Example:
        >>> declare("accuracy").name
        'accuracy'
    """
    if isinstance(metric, str):
        built_in(metric)
    elif inspect.isclass(metric):
        missing = [m for m in ("from_model_output", "merge", "compute") if not hasattr(metric, m)]
        if missing:
            raise errors.ArgumentTypeError(
                f"the metric class {metric.__name__} has no {', '.join(missing)}",
                fix="pass a class with the CLU protocol: from_model_output, merge, compute",
            )
    elif not isinstance(metric, Metric) and not callable(metric):
        raise errors.ArgumentTypeError(
            f"a metric must be a name, a Metric, a function or a CLU class; got {metric!r}",
            fix="pass for example 'accuracy', or a function of (y_true, y_pred)",
        )
    return Declared(
        _name(metric, name), metric, _accumulate(accumulate), _fields(transform_or_fields)
    )


def declare_batch_mean(name: str, field: str) -> Declared:
    """The exact average over the data of a scalar that is each batch's weighted mean.

    Args:
        name: Its key in the results.
        field: The output that holds the scalar. A batch weighs the sum of ``sample_weight``, or
            its number of examples (the leading axis of ``y_true``).

    Returns:
        The declaration; a batch of weight 0 adds nothing, even where its mean is NaN.
    """
    return Declared(name, "mean_of_batches", "running_average", (field,), batch_mean=True)


def _name(metric: Any, name: str | None) -> str:
    if name is not None:
        if not isinstance(name, str) or not name:
            raise errors.ArgumentTypeError(
                f"the name of a metric must be a string that is not empty, got {name!r}",
                fix="pass name='...'",
            )
        return name
    if isinstance(metric, str):
        return metric
    own = metric.name if isinstance(metric, Metric) else getattr(metric, "__name__", "")
    if not own or own == "<lambda>":
        raise errors.ArgumentError(
            f"the metric {metric!r} has no usable name",
            fix="pass name='...'",
        )
    return str(own)


def _accumulate(accumulate: Any) -> Accumulate:
    if isinstance(accumulate, str):
        if accumulate not in accumulate_lib.NAMES:
            raise errors.unknown_name("accumulate", accumulate, accumulate_lib.NAMES)
        return accumulate
    if accumulate is None or callable(accumulate):
        return accumulate
    raise errors.ArgumentTypeError(
        f"accumulate must be None, a name or a function (acc, obs, i) -> acc; got {accumulate!r}",
        fix=f"use one of: {', '.join(accumulate_lib.NAMES)}",
    )


def _fields(fields: Any) -> Fields:
    if isinstance(fields, str):
        return (fields,)
    if isinstance(fields, (tuple, list)) and all(isinstance(f, str) for f in fields):
        return tuple(fields)
    if callable(fields):
        return fields
    raise errors.ArgumentTypeError(
        f"transform_or_fields must be names of outputs, or a function; got {fields!r}",
        fix="pass for example ('y_true', 'y_pred')",
    )
