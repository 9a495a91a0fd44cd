"""The observations of metrics, one per batch, which a reduction accumulates.

    observe = observe_function(declare(top, accumulate="running_max"), top)
    value, per_example, weights = observe(inputs)

Invariant: whether a leaf has one value per example or one for its batch is what ``per`` says, or
else follows from its shape. By default, a scalar is rejected if the weights of the examples would
change it.
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
from jaxloop.metrics.exact_int import is_exact
from jaxloop.metrics.inputs import Inputs
from jaxloop.metrics.metric import Metric, updated
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

    def observe(inputs: Inputs) -> Observation:
        args = inputs.arguments(spec)
        weights = batch_weights(inputs.weight, inputs.num_examples(args), spec.title)
        value = jax.tree.map(jnp.asarray, fn(*args))
        per_example = [_is_per_example(spec, leaf, weights) for leaf in jax.tree.leaves(value)]
        return Observation(value, per_example, weights)

    return observe


def _is_per_example(spec: MetricSpec, leaf: jax.Array, weights: BatchWeights) -> bool:
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise errors.ShapeError(
            f"{spec.title} must return real numbers, got {leaf.dtype}",
            fix="return the real part, or the absolute value",
        )
    if spec.per == "batch":
        return False
    if leaf.ndim and leaf.shape[0] == weights.num_examples:
        return True
    if spec.per == "example":
        raise errors.ShapeError(
            f"{spec.title} must return one value per example, as per='example' says, got shape "
            f"{leaf.shape} for a batch of {weights.num_examples} examples",
            fix="return one value per example, or pass per='batch'",
        )
    # "last" and accumulate functions do not average over examples, so they may take a scalar even
    # if the batch has weights.
    if leaf.ndim == 0:
        if (
            weights.weight is not None
            and spec.accumulate != "last"
            and not callable(spec.accumulate)
        ):
            raise scalar_with_weights(
                spec.name, " or, if it is one value of the batch, pass per='batch'"
            )
        return False
    if callable(spec.accumulate):
        return False
    raise errors.ShapeError(
        f"{spec.title} must return one value per example or a scalar, got shape {leaf.shape} for "
        f"a batch of {weights.num_examples} examples",
        fix="return one value per example, or pass per='batch' if the array is one value of the "
        "batch",
    )


def observe_metric(spec: MetricSpec, metric: Metric) -> Observe:
    """Observes the value of a `Metric` over the batch."""

    def observe(inputs: Inputs) -> Observation:
        args = inputs.arguments(spec)
        acc = updated(metric, metric.init(), args, inputs.weight, spec.title)
        value = metric.compute(acc)
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
        count = inputs.reported.get("num_examples")
        if count is not None and inputs.weight is None:
            if jnp.shape(count) != ():
                raise errors.ShapeError(
                    f"{spec.title}: the output num_examples must be a scalar, got shape "
                    f"{jnp.shape(count)}",
                    fix="report the number of examples in the batch, or use another name",
                )
            # A batch of one example, whose weight is the number.
            inputs = inputs.weighted(jnp.reshape(count, (1,)))
        num_examples = inputs.num_examples(inputs.reported.get("y_true"))
        return _one_value(spec, value, inputs, num_examples)

    return observe


def clu_keywords(
    spec: MetricSpec, cls: type[CluMetric], inputs: Inputs
) -> tuple[dict[str, PyTree], int]:
    """Returns the keywords for ``cls.from_model_output``, and the number of examples."""
    named = spec.fields != DEFAULT_FIELDS
    args = inputs.arguments(spec) if named else None
    keywords = clu_protocol.model_output(cls, inputs.examples, args, inputs.weight, spec.name)
    return keywords, inputs.num_examples(args if named else keywords)


def _one_value(spec: MetricSpec, value: PyTree, inputs: Inputs, num_examples: int) -> Observation:
    value = jax.tree.map(jnp.asarray, value)
    weights = batch_weights(inputs.weight, num_examples, spec.title)
    return Observation(value, [False] * len(jax.tree.leaves(value, is_leaf=is_exact)), weights)
