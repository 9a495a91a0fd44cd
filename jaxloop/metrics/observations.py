"""The observations of metrics, one per batch, which a reduction accumulates.

    observe = observe_function(declare(top, accumulate="running_max"), top)
    value, per_example, weights = observe(inputs)

Invariant: whether a leaf has one value per example or one for its batch follows from its shape, and
a scalar is rejected if the weights of the examples would change it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.metrics import clu_protocol
from jaxloop.metrics.clu_protocol import CluMetric
from jaxloop.metrics.declare import DEFAULT_FIELDS, MetricSpec
from jaxloop.metrics.inputs import Inputs
from jaxloop.metrics.metric import Metric
from jaxloop.metrics.weights import BatchWeights, batch_weights, scalar_with_weights


class Observation(NamedTuple):
    """The observation of a metric in one batch.

    Attributes:
        value: A pytree of arrays.
        per_example: For each leaf, whether it has one value per example.
        weights: The weights of the examples.
    """

    value: PyTree
    per_example: list[bool]
    weights: BatchWeights


Observe = Callable[[Inputs], Observation]


def observe_function(spec: MetricSpec, fn: Callable[..., PyTree]) -> Observe:
    """Observes what a function returns: values per example, or one value for the batch."""
    # "last" and accumulate functions do not average over examples, so they may take a scalar even
    # if the batch has weights.
    takes_scalars = spec.accumulate == "last" or callable(spec.accumulate)

    def observe(inputs: Inputs) -> Observation:
        args = inputs.arguments(spec)
        weights = batch_weights(inputs.weight, inputs.num_examples(args), spec.title)
        value = jax.tree.map(jnp.asarray, fn(*args))
        per_example = []
        for leaf in jax.tree.leaves(value):
            if leaf.ndim == 0:
                if inputs.weight is not None and not takes_scalars:
                    raise scalar_with_weights(spec.name)
                per_example.append(False)
            elif leaf.shape[0] == weights.num_examples:
                per_example.append(True)
            elif callable(spec.accumulate):
                per_example.append(False)
            else:
                raise errors.ShapeError(
                    f"{spec.title} must return one value per example or a scalar, got shape "
                    f"{leaf.shape} for a batch of {weights.num_examples} examples",
                    fix="return one value per example, or a scalar",
                )
        return Observation(value, per_example, weights)

    return observe


def observe_metric(spec: MetricSpec, metric: Metric) -> Observe:
    """Observes the value of a `Metric` over the batch."""

    def observe(inputs: Inputs) -> Observation:
        args = inputs.arguments(spec)
        value = metric.compute(metric.update(metric.init(), *args, weight=inputs.weight))
        return _one_value(spec, value, inputs, inputs.num_examples(args))

    return observe


def observe_clu(spec: MetricSpec, cls: type[CluMetric]) -> Observe:
    """Observes the value of a class with the CLU protocol over the batch."""

    def observe(inputs: Inputs) -> Observation:
        keywords, num_examples = clu_keywords(spec, cls, inputs)
        value = clu_protocol.compute(clu_protocol.from_output(cls, keywords))
        return _one_value(spec, value, inputs, num_examples)

    return observe


def observe_batch_mean(spec: MetricSpec) -> Observe:
    """Observes a field that is the weighted mean of its batch."""

    def observe(inputs: Inputs) -> Observation:
        (value,) = inputs.arguments(spec)
        if jnp.shape(value) != ():
            raise errors.ShapeError(
                f"{spec.title} must be the mean of its batch, a scalar, got shape "
                f"{jnp.shape(value)}",
                fix="reduce the loss to a scalar first",
            )
        num_examples = inputs.num_examples(inputs.reported.get("y_true"))
        return _one_value(spec, value, inputs, num_examples)

    return observe


def clu_keywords(
    spec: MetricSpec, cls: type[CluMetric], inputs: Inputs
) -> tuple[dict[str, PyTree], int]:
    """Returns the keywords for ``cls.from_model_output``, and the number of examples."""
    named = spec.fields != DEFAULT_FIELDS
    args = inputs.arguments(spec) if named else None
    keywords = clu_protocol.model_output(cls, inputs.reported, args, inputs.weight, spec.name)
    return keywords, inputs.num_examples(args if named else keywords)


def _one_value(spec: MetricSpec, value: PyTree, inputs: Inputs, num_examples: int) -> Observation:
    value = jax.tree.map(jnp.asarray, value)
    weights = batch_weights(inputs.weight, num_examples, spec.title)
    return Observation(value, [False] * len(jax.tree.leaves(value)), weights)
