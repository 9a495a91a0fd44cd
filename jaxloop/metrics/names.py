"""The meaning of a metric: which metric a name is, and which values of a metric are better.

    spec = resolved(declare("kl"), inputs)      # averages what the step reports as "kl"
    better_of(declare("accuracy"))              # "max"

Invariant: a built-in metric takes precedence if the step reports or carries its fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

import jax.numpy as jnp

from jaxloop import errors
from jaxloop._core.types import Better, PyTree
from jaxloop.metrics.declare import (
    BatchMean,
    Derived,
    EachScalar,
    MetricSpec,
    named_metric,
    names,
    per_without_function,
)
from jaxloop.metrics.inputs import Inputs

OF_A_STEP = frozenset({"gradient_norm", "update_norm", "parameter_norm", "learning_rate"})
"""The scalars of these names belong to a step, not to its examples, so weights do not apply."""


def resolved(spec: MetricSpec, inputs: Inputs) -> MetricSpec:
    """Returns a metric whose name, if it has one instead of a function, is that of a built-in.

    The name of a reported or carried value becomes a function of that value.

    Raises:
        UnknownNameError: The name is neither that of a built-in nor of a value.
        ArgumentError: ``per`` was given with a built-in metric.
    """
    name = spec.metric
    if not isinstance(name, str):
        return spec
    is_built_in = name in names()
    fields = () if callable(spec.fields) else spec.fields
    if name in inputs.named and not (is_built_in and all(f in inputs.named for f in fields)):
        per = spec.per
        if per is None and name in OF_A_STEP and jnp.shape(inputs.named[name]) == ():
            per = "batch"
        return dataclasses.replace(spec, metric=_reported, fields=(name,), per=per)
    if name in OF_A_STEP:
        raise errors.UnknownNameError(
            f"metric {name!r} must be a value that the step reports, got a step that does not",
            fix=f"report it: jl.trainer(..., report=({name!r},))",
        )
    if not is_built_in:
        raise errors.unknown_name("metric", name, [*names(), *map(str, inputs.named)])
    if spec.per is not None:
        raise per_without_function(name, spec.per)
    return spec


def not_reading(specs: Iterable[MetricSpec], outputs: Collection[str]) -> tuple[MetricSpec, ...]:
    """Returns the metrics that read none of some outputs, not even through derived metrics.

    What a function in place of field names reads is not known, so its metric stays.

    Example:
        >>> from jaxloop.metrics.declare import declare
        >>> specs = [declare("gradient_norm"), declare("accuracy")]
        >>> [spec.name for spec in not_reading(specs, ["gradient_norm"])]
        ['accuracy']
    """
    kept = [one for one in specs if not _reads(one, outputs)]
    while True:
        names = {one.name for one in specs} - {one.name for one in kept}
        left = [
            one
            for one in kept
            if not (isinstance(one.metric, Derived) and names.intersection(one.metric.of))
        ]
        if len(left) == len(kept):
            return tuple(kept)
        kept = left


def _reads(spec: MetricSpec, outputs: Collection[str]) -> bool:
    fields = () if callable(spec.fields) else spec.fields
    return spec.metric in outputs or any(field in outputs for field in fields)


def names_of_value(value: str) -> list[str]:
    """Returns the names that the metric of a value may have, beginning with the longest.

    A metric of several outputs has a value for each, under its name and the path of the output.

    Example:
        >>> names_of_value("accuracy/head/0")
        ['accuracy/head/0', 'accuracy/head', 'accuracy']
    """
    parts = value.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]


def better_of(spec: MetricSpec) -> Better | None:
    """Returns which values of a metric are better, or None if that is unknown.

    It is known for built-in metrics, losses, and metrics with `Metric.better`. A value that a step
    reports under the name of a built-in metric, or as "loss", is taken for what its name says.

    Example:
        >>> from jaxloop.metrics.declare import declare
        >>> better_of(declare("accuracy")), better_of(declare("huber")), better_of(declare(max))
        ('max', 'min', None)
    """
    metric = spec.metric
    if callable(spec.accumulate):
        return None
    if isinstance(metric, BatchMean):
        return "min"  # the loss of the training
    if isinstance(metric, str):
        if metric not in names():
            return "min" if metric == "loss" else None  # the usual name of a reported loss
        metric = named_metric(metric, spec.accumulate)
    better: object = getattr(metric, "better", None)
    return better if better == "min" or better == "max" else None


def better_by_name(
    specs: Iterable[MetricSpec], names: Iterable[str] | None
) -> dict[str, Better | None]:
    """Returns which values are better of each metric, by name. None means that it is unknown.

    Args:
        specs: The declared metrics.
        names: The names of the values, with which the metrics of each scalar are known too.
    """
    found = {one.name: better_of(one) for one in specs if not isinstance(one.metric, EachScalar)}
    for name in names or ():
        if not any(one in found for one in names_of_value(name)):
            found[name] = "min" if name == "loss" else None
    return found


def _reported(value: PyTree) -> PyTree:
    return value
