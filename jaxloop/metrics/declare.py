"""A metric as the user declares it, checked as far as possible without data.

    spec = declare("accuracy")
    spec = declare(my_fn, "norm", "running_max", ("gradients",))

Invariant: a `MetricSpec` is hashable, and equal declarations are equal, so it can be part of the
key of a compiled step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from jaxloop import errors, losses
from jaxloop._core.types import PyTree
from jaxloop.losses import Loss
from jaxloop.metrics import classification, loss_metrics, reductions, regression
from jaxloop.metrics.clu_protocol import CluMetric
from jaxloop.metrics.metric import Metric
from jaxloop.metrics.reductions import AccumulateFn, AccumulateName
from jaxloop.metrics.windows import Window

MetricLike: TypeAlias = str | Metric | Callable[..., PyTree] | type[CluMetric]
"""A name of a built-in metric or of a reported value, a `Metric`, a function, or a CLU class."""

AccumulateLike: TypeAlias = AccumulateName | Window | AccumulateFn | None
"""How to combine the values of the batches. None uses the metric's own accumulator."""

FieldsFn: TypeAlias = Callable[[dict[str, PyTree]], list[PyTree] | tuple[PyTree, ...]]

FieldsLike: TypeAlias = str | Sequence[str] | FieldsFn
"""Names of outputs or parts of the step state, or a function that returns the arguments."""

Per: TypeAlias = Literal["example", "batch"] | None
"""Whether a function returns one value per example or one per batch. None decides by the shape."""

WhereLike: TypeAlias = str | Callable[[dict[str, PyTree]], PyTree] | None
"""The examples that count: the name of a boolean mask, or a function that returns one."""

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


TAKES_PAIRS = frozenset({"connectionist_temporal_classification", "margin_ranking"})
"""The metrics by name for which a pair of arrays is one argument, and not two outputs."""


@dataclass(frozen=True)
class BatchMean:
    """The metric of a field that is already the weighted mean of its batch, such as the loss."""


@dataclass(frozen=True)
class Derived:
    """The metric of a value that is computed on the host from the values of other metrics.

    Attributes:
        fn: Returns the value.
        of: The names of the other metrics, whose values ``fn`` gets.
    """

    fn: Callable[..., PyTree]
    of: tuple[str, ...]


@dataclass(frozen=True)
class EachScalar:
    """The metrics of all scalars that the step reports. Their names are known once it is traced.

    Attributes:
        per_example: Whether values with one number per example have a metric too.
    """

    per_example: bool = False


@dataclass(frozen=True)
class MetricSpec:
    """A declared metric.

    Attributes:
        name: Its key in the results.
        metric: A name, a `Metric`, a function, a class with the CLU protocol, `BatchMean`,
            `Derived` or `EachScalar`.
        accumulate: None, one of `reductions.NAMES`, a `Window`, or ``(acc, obs, i) -> acc``.
        fields: Names, or a function of outputs and step state, merged into one dict.
        per: Whether a function returns one value per example or one per batch.
        where: The name of a mask, a function that returns one, or None.
    """

    name: str
    metric: MetricLike | BatchMean | Derived | EachScalar
    accumulate: AccumulateLike = None
    fields: tuple[str, ...] | FieldsFn = DEFAULT_FIELDS
    per: Per = None
    where: WhereLike = None

    @property
    def title(self) -> str:
        """The name of this metric in error messages."""
        return f"metric {self.name!r}"


def names() -> tuple[str, ...]:
    """Returns the names of all built-in metrics, sorted."""
    return tuple(sorted({*_BUILT_INS, *losses.names()}))


def built_in(name: str) -> Metric:
    """Returns the built-in metric of that name, with its default arguments.

    Raises:
        UnknownNameError: No metric has this name.
    """
    if name in _BUILT_INS:
        return _BUILT_INS[name]()
    if name in losses.names():
        return loss_metrics.of_loss(name)
    raise errors.unknown_name("metric", name, names())


def named_metric(
    name: str, accumulate: AccumulateLike
) -> Metric | Callable[..., PyTree] | type[CluMetric]:
    """Returns the built-in metric of that name in a form that a loop can accumulate.

    Raises:
        UnknownNameError: No metric has this name.
        ArgumentError: It is a loss without a value over a data set.
    """
    if name in _BUILT_INS:
        return _BUILT_INS[name]()
    found = losses.get(name)
    resolved = loss_metrics.resolve(name, found, accumulated=accumulate is not None)
    return built_in(resolved) if isinstance(resolved, str) else resolved


def declare(
    metric: MetricLike,
    name: str | None = None,
    accumulate: AccumulateLike = None,
    transform_or_fields: FieldsLike = DEFAULT_FIELDS,
    *,
    per: Per = None,
    where: WhereLike = None,
) -> MetricSpec:
    """Declares a metric, and raises every error that needs no data.

    Args:
        metric: The name of a built-in metric or of a reported value, a `Metric`, a function of the
            extracted values, or a class with ``from_model_output``, ``merge`` and ``compute``. A
            function of `optax.losses`, also inside `functools.partial`, `jax.jit` or
            `functools.wraps`, means the loss, and gets its arguments in its own order.
        name: Its key in the results. The default is the metric's own name.
        accumulate: None (the metric's own accumulator, or the average of a function's values),
            ``"running_average"``, ``"running_sum"``, ``"running_min"``, ``"running_max"``,
            ``"last"``, a `window`, or ``(acc, obs, i) -> acc``.
        transform_or_fields: Names of outputs or parts of the step state, or a function of both,
            merged into one dict, that returns the list of arguments.
        per: "example" or "batch", what the result of a function, or a reported value, stands for.
            None decides by the shape.
        where: The name of a boolean mask, ``(batch,)`` or any leading part of the target's shape,
            or a function like ``transform_or_fields`` that returns one.

    Returns:
        The declared metric.

    Raises:
        UnknownNameError: No accumulator has this name, or no metric that takes fields. A name
            without fields may be that of a reported value, which `bind` knows.
        ArgumentTypeError: An argument has the wrong type.
        ArgumentError: The metric has no usable name, it is a loss without a value over a data set,
            or ``per`` is not for this metric.

    Example:
        >>> declare("accuracy").name
        'accuracy'
    """
    accumulated = _checked_accumulate(accumulate)
    fields = _checked_fields(transform_or_fields)
    if isinstance(metric, str):
        if metric not in names() and fields != DEFAULT_FIELDS:
            raise errors.unknown_name("metric", metric, names())
    elif inspect.isclass(metric):
        missing = [m for m in ("from_model_output", "merge", "compute") if not hasattr(metric, m)]
        if missing:
            raise errors.ArgumentTypeError(
                f"a metric class must have from_model_output, merge and compute, got "
                f"{metric.__name__} without {', '.join(missing)}",
                fix="pass a class with the CLU protocol: from_model_output, merge, compute",
            )
    elif not isinstance(metric, Metric) and not callable(metric):
        raise errors.ArgumentTypeError(
            f"a metric must be a name, a Metric, a function or a CLU class, got {metric!r}",
            fix="pass a name such as 'accuracy', or a function of (y_true, y_pred)",
        )
    loss = _loss_of(metric, fields)
    return MetricSpec(
        _checked_name(loss.name if loss is not None else metric, name),
        _resolved(metric, loss, accumulated),
        accumulated,
        fields,
        _checked_per(metric, per),
        _checked_where(where),
    )


def _loss_of(metric: MetricLike, fields: tuple[str, ...] | FieldsFn) -> Loss | None:
    """Returns the loss that a metric is, by its name or as a function of Optax."""
    if isinstance(metric, str):
        is_loss = metric in losses.names() and metric not in _BUILT_INS
        return losses.get(metric) if is_loss else None
    if isinstance(metric, losses.Objective):
        return losses.get(metric)  # raises
    if isinstance(metric, Metric | type) or not losses.is_optax_loss(metric):
        return None
    if fields == DEFAULT_FIELDS[::-1]:
        raise errors.ArgumentError(
            f"the fields of a loss must be its target and its prediction, in this order, got "
            f"{fields}; a loss of Optax gets them in Optax's order",
            fix=f"pass transform_or_fields={DEFAULT_FIELDS}, which is the default",
        )
    return losses.get(metric)


def _resolved(metric: MetricLike, loss: Loss | None, accumulate: AccumulateLike) -> MetricLike:
    if isinstance(metric, str):
        if loss is not None:
            named_metric(metric, accumulate)  # raises if the loss has no value over a data set
        return metric  # `bind` knows whether the step reports a value of this name
    if loss is not None and not isinstance(metric, Metric | type):
        return loss_metrics.resolve(metric, loss, accumulated=accumulate is not None)
    return loss_metrics.carried(metric) if isinstance(metric, Metric) else metric


def declare_batch_mean(name: str, field: str) -> MetricSpec:
    """Declares the exact average over the data of a scalar that is the weighted mean of its batch.

    Args:
        name: Its key in the results.
        field: The output that holds the scalar. The weight of a batch is the sum of
            ``sample_weight``, or its number of examples: the output ``num_examples``, a scalar, or
            else the leading axis of ``y_true``.

    Returns:
        The declared metric. A batch of weight 0 adds nothing, even if its mean is NaN.
    """
    return MetricSpec(name, BatchMean(), "running_average", (field,))


def of_training_loss(spec: MetricSpec) -> MetricSpec:
    """Returns a metric of the name "loss" as one of the trainer's loss, the mean of its batch.

    Example:
        >>> of_training_loss(declare("loss", "smooth", "last")).metric
        BatchMean()
    """
    if spec.metric != "loss" or spec.per is not None or spec.where is not None:
        return spec
    batch_mean = declare_batch_mean(spec.name, "loss")
    return (
        batch_mean if spec.accumulate is None else replace(batch_mean, accumulate=spec.accumulate)
    )


def _checked_name(metric: MetricLike, name: object) -> str:
    if name is not None:
        if not isinstance(name, str) or not name:
            raise errors.ArgumentTypeError(
                f"the name of a metric must be a nonempty string, got {name!r}",
                fix="pass name='...'",
            )
        return name
    if isinstance(metric, str):
        return metric
    own = metric.name if isinstance(metric, Metric) else getattr(metric, "__name__", "")
    if not own or own == "<lambda>":
        raise errors.ArgumentError(
            f"a metric must have a name, got {metric!r} without one",
            fix="pass name='...'",
        )
    return str(own)


def _checked_accumulate(accumulate: AccumulateLike) -> AccumulateLike:
    if isinstance(accumulate, str):
        if accumulate not in reductions.NAMES:
            raise errors.unknown_name("accumulate", accumulate, reductions.NAMES)
        return accumulate
    if accumulate is None or isinstance(accumulate, Window) or callable(accumulate):
        return accumulate
    raise errors.ArgumentTypeError(
        "accumulate must be None, a name, jl.window(n) or a function (acc, obs, i) -> acc, got "
        f"{accumulate!r}",
        fix=f"use jl.window(n) or one of: {', '.join(reductions.NAMES)}",
    )


def _checked_fields(fields: FieldsLike) -> tuple[str, ...] | FieldsFn:
    if isinstance(fields, str):
        return (fields,)
    if isinstance(fields, tuple | list) and all(isinstance(f, str) for f in fields):
        return tuple(fields)
    if callable(fields):
        return fields
    raise errors.ArgumentTypeError(
        f"transform_or_fields must be names of outputs or a function, got {fields!r}",
        fix="pass names such as ('y_true', 'y_pred')",
    )


def _checked_per(metric: MetricLike, per: object) -> Per:
    if per is None:
        return None
    if per != "example" and per != "batch":
        raise errors.ArgumentError(
            f"per must be 'example', 'batch' or None, got {per!r}",
            fix="pass per='example' if the function returns one value per example, or per='batch'",
        )
    if isinstance(metric, Metric) or inspect.isclass(metric):
        raise per_without_function(metric, per)
    return per


def per_without_function(metric: MetricLike, per: object) -> errors.ArgumentError:
    """Returns the error for a metric that decides itself what a value is for."""
    return errors.ArgumentError(
        f"per={per!r} must be given with a function or a reported value, got the metric {metric!r}",
        fix="leave out per=, because such a metric decides this itself",
    )


def _checked_where(where: WhereLike) -> WhereLike:
    if where is None or isinstance(where, str) or callable(where):
        return where
    raise errors.ArgumentTypeError(
        f"where must be the name of a mask or a function that returns one, got {where!r}",
        fix="pass a function such as lambda named: named['y_true'] >= 0",
    )
