"""The meaning of a metric's name: a built-in metric, or a value that the step reports.

    spec = resolved(declare("kl"), inputs)      # averages what the step reports as "kl"

Invariant: a built-in metric takes precedence if the step reports or carries its fields.
"""

from __future__ import annotations

import dataclasses

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.metrics.declare import MetricSpec, names, per_without_function
from jaxloop.metrics.inputs import Inputs


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
        return dataclasses.replace(spec, metric=_reported, fields=(name,))
    if not is_built_in:
        raise errors.unknown_name("metric", name, [*names(), *map(str, inputs.named)])
    if spec.per is not None:
        raise per_without_function(name, spec.per)
    return spec


def _reported(value: PyTree) -> PyTree:
    return value
