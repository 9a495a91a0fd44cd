"""The metrics of a loop, bound to the names and shapes of its step.

    metrics = bind([declare("accuracy")], outputs, step_state, batch)    # reads shapes only
    accs = metrics.update(metrics.init(), outputs, step_state, batch)    # a batch of any size
    values = metrics.compute(accs)

Invariant: `bind` fixes the structure, shapes and dtypes of the accumulators, so that a compiled
loop can carry them. `bind` also raises every error about names and shapes, before the first step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.metrics import clu_protocol
from jaxloop.metrics.accumulators import (
    cast_like,
    strongly_typed,
    structures_differ,
)
from jaxloop.metrics.clu_protocol import CluMetric
from jaxloop.metrics.collection import SKIPPED, Metrics, Slot
from jaxloop.metrics.declare import (
    DEFAULT_FIELDS,
    TAKES_PAIRS,
    BatchMean,
    Derived,
    EachScalar,
    MetricSpec,
    named_metric,
)
from jaxloop.metrics.derived import in_order
from jaxloop.metrics.exact_int import is_exact
from jaxloop.metrics.inputs import Inputs
from jaxloop.metrics.metric import Metric, delta_of, updated
from jaxloop.metrics.names import resolved
from jaxloop.metrics.observations import (
    Observe,
    clu_keywords,
    observe_batch_mean,
    observe_clu,
    observe_function,
    observe_metric,
)
from jaxloop.metrics.reductions import reduction_of
from jaxloop.metrics.scalars import of_each_scalar
from jaxloop.metrics.sums import checked_nodes, merge_sums, summed
from jaxloop.metrics.weights import BatchWeights, batch_weights, is_float_weight

_NOT_METRICS = frozenset({"sample_weight", "num_examples", SKIPPED})
"""The outputs that say how to accumulate the others."""

_T = TypeVar("_T")


def bind(
    specs: Iterable[MetricSpec], outputs: PyTree, step_state: PyTree, batch: PyTree
) -> Metrics:
    """Binds metrics to a step that reports and carries values of these names and shapes.

    Args:
        specs: The metrics. If two have the same name, the last one counts.
        outputs: The outputs of the step, a mapping of arrays or `jax.ShapeDtypeStruct`.
        step_state: The step state.
        batch: A batch. Only its number of examples is read.

    Returns:
        The bound metrics.

    Raises:
        UnknownNameError: A field is neither reported nor carried, or a metric's name is neither
            that of a built-in nor of a reported or carried value. Or a metric is derived from one
            that does not exist.
        ShapeError: Shapes do not fit, or a metric returns a scalar for a batch with weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxloop.metrics.declare import declare
        >>> outputs = {"y_true": jnp.array([0, 1]), "y_pred": jnp.array([0.2, 0.3])}
        >>> metrics = bind([declare("accuracy")], outputs, {}, None)
        >>> accs = metrics.update(metrics.init(), outputs, {}, None)
        >>> float(metrics.compute(accs)["accuracy"])
        0.5
    """
    last = {spec.name: spec for spec in specs}
    inputs = Inputs.of(outputs, step_state, batch).abstract()
    slots = {}
    for spec in _expanded(last, inputs):
        slots[spec.name] = slot = _bind_one(spec, inputs)
        # One abstract update here raises its errors before the first step.
        _eval_shape(functools.partial(_once, slot), inputs)
    return Metrics(tuple(slots.values()), in_order(last.values(), slots))


def _expanded(declared: Mapping[str, MetricSpec], inputs: Inputs) -> list[MetricSpec]:
    """Returns one metric for each accumulated value, in the order of their declarations."""
    specs = {
        name: _of_each_output(resolved(spec, inputs), inputs)
        for name, spec in declared.items()
        if not isinstance(spec.metric, Derived | EachScalar)
    }
    # A metric that was declared by its name takes precedence over a scalar of the same name.
    taken = {spec.name for several in specs.values() for spec in several} | _NOT_METRICS
    taken |= declared.keys()
    for name, spec in declared.items():
        if isinstance(spec.metric, EachScalar):
            specs[name] = of_each_scalar(spec, inputs, taken)
    return [spec for name in declared for spec in specs.get(name, ())]


def _of_each_output(spec: MetricSpec, inputs: Inputs) -> list[MetricSpec]:
    """Returns a metric by name as one metric for each leaf of a prediction with several outputs.

    Targets and predictions pair in order, as in a loss. The path of the prediction gives the name.
    """
    if not isinstance(spec.metric, str) or spec.metric in TAKES_PAIRS:
        return [spec]
    args = _eval_shape(lambda inputs: inputs.arguments(spec), inputs)
    if jax.tree_util.all_leaves(args):
        return [spec]
    counts = [len(jax.tree.leaves(arg)) for arg in args]
    if len(set(counts)) != 1:
        raise errors.ShapeError(
            f"{spec.title}: its arguments must have equally many outputs, got "
            f"{' and '.join(map(str, counts))}",
            fix="select the arrays with transform_or_fields=lambda named: [...], a list of the "
            "target and the prediction",
        )

    def leaf(index: int, named: dict[str, PyTree]) -> list[PyTree]:
        chosen = Inputs({}, named, None).arguments(spec)
        return [jax.tree.leaves(argument)[index] for argument in chosen]

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(args[-1])]
    return [
        dataclasses.replace(
            spec,
            name=f"{spec.name}/{jax.tree_util.keystr(path, simple=True, separator='/')}",
            fields=functools.partial(leaf, index),
        )
        for index, path in enumerate(paths)
    ]


def _bind_one(spec: MetricSpec, inputs: Inputs) -> Slot:
    if spec.where is not None:
        weight = _eval_shape(lambda inputs: inputs.masked(spec).sample_weight, inputs)
        reported = {**inputs.reported, "sample_weight": weight}
        slot = _bind_one(
            dataclasses.replace(spec, where=None), dataclasses.replace(inputs, reported=reported)
        )
        delta = slot.delta
        return dataclasses.replace(
            slot,
            update=lambda acc, inputs: slot.update(acc, inputs.masked(spec)),
            delta=None if delta is None else lambda inputs: delta(inputs.masked(spec)),
        )
    metric = spec.metric
    assert not isinstance(metric, Derived | EachScalar)
    if isinstance(metric, BatchMean):
        return _bind_observations(spec, observe_batch_mean(spec), inputs)
    _check_weights(spec, inputs)
    if isinstance(metric, str):
        metric = named_metric(metric, spec.accumulate)
    if isinstance(metric, type):
        cls = metric
        keywords = _eval_shape(lambda inputs: clu_keywords(spec, cls, inputs)[0], inputs)
        if inputs.sample_weight is not None:
            dtype = jnp.result_type(inputs.sample_weight)
            clu_protocol.check_weights(metric, keywords, dtype, spec.name)
        if spec.accumulate is None:
            return _bind_clu(spec, metric, keywords)
        return _bind_observations(spec, observe_clu(spec, metric), inputs)
    if isinstance(metric, Metric):
        if metric.weighted is not None and is_float_weight(inputs.sample_weight):
            metric = metric.weighted
        if spec.accumulate is None:
            return _bind_metric(spec, metric)
        return _bind_observations(spec, observe_metric(spec, metric), inputs)
    return _bind_observations(spec, observe_function(spec, metric), inputs)


def _check_weights(spec: MetricSpec, inputs: Inputs) -> None:
    """Checks that weights of several axes fit the arguments of a metric."""
    if isinstance(spec.metric, type) and spec.fields == DEFAULT_FIELDS:
        args: PyTree = {**inputs.reported, "sample_weight": None}
    elif spec.per == "batch" or spec.accumulate == "last" or callable(spec.accumulate):
        return  # such an observation need not have one value per example
    else:
        args = _eval_shape(lambda inputs: inputs.selected(spec), inputs)
    inputs.check_weights(spec.title, args, all_args=isinstance(spec.metric, str))


def _bind_metric(spec: MetricSpec, metric: Metric) -> Slot:
    def update(acc: PyTree, inputs: Inputs) -> PyTree:
        return updated(metric, acc, inputs.arguments(spec), inputs.weight, spec.title)

    slot = Slot(spec.name, metric.init, update, metric.merge, metric.compute)
    adds = delta_of(metric, spec.title)
    if adds is None:
        return slot

    def delta(inputs: Inputs) -> PyTree:
        return adds(inputs.arguments(spec), inputs.weight)

    return dataclasses.replace(slot, delta=delta)


def _bind_clu(spec: MetricSpec, cls: type[CluMetric], keywords: dict[str, PyTree]) -> Slot:
    shapes = jax.eval_shape(functools.partial(clu_protocol.from_output, cls), keywords)
    metric = clu_protocol.clu_metric(cls, shapes, spec.name)

    def update(acc: PyTree, inputs: Inputs) -> PyTree:
        keywords, num_examples = clu_keywords(spec, cls, inputs)
        weights = batch_weights(inputs.weight, num_examples, spec.title)
        return metric.update(acc, keywords, weight=weights.present)

    return Slot(spec.name, metric.init, update, metric.merge, metric.compute)


def _bind_observations(spec: MetricSpec, observe: Observe, inputs: Inputs) -> Slot:
    """Binds a metric that observes each batch, and reduces the observations leaf by leaf."""
    reduction = reduction_of(spec.accumulate or "running_average")
    per_example: tuple[bool, ...] = ()

    def value_of(inputs: Inputs) -> PyTree:
        nonlocal per_example
        observation = observe(inputs)
        per_example = tuple(observation.per_example)
        return observation.value

    shapes, structure = jax.tree.flatten(_eval_shape(value_of, inputs), is_leaf=is_exact)
    kinds = per_example
    float_weights = is_float_weight(inputs.sample_weight)

    def init() -> list[PyTree]:
        return [
            reduction.init(shape, kind, float_weights)
            for shape, kind in zip(shapes, kinds, strict=True)
        ]

    def observed(inputs: Inputs) -> tuple[list[PyTree], BatchWeights]:
        value, found, weights = observe(inputs)
        leaves, found_structure = jax.tree.flatten(value, is_leaf=is_exact)
        _check_observation(spec, (found_structure, structure), (tuple(found), kinds))
        return leaves, weights

    def update(acc: list[PyTree], inputs: Inputs) -> list[PyTree]:
        leaves, weights = observed(inputs)
        return [
            reduction.update(old, leaf, kind, weights)
            for old, leaf, kind in zip(acc, leaves, kinds, strict=True)
        ]

    def merge(a: list[PyTree], b: list[PyTree]) -> list[PyTree]:
        return [reduction.merge(x, y) for x, y in zip(a, b, strict=True)]

    def compute(acc: list[PyTree]) -> PyTree:
        return jax.tree.unflatten(structure, [reduction.compute(leaf) for leaf in acc])

    if reduction.delta is None:
        return Slot(spec.name, init, update, merge, compute)
    adds, accs = reduction.delta, jax.eval_shape(init)

    def delta(inputs: Inputs) -> list[PyTree]:
        leaves, weights = observed(inputs)
        return [
            adds(acc, leaf, kind, weights)
            for acc, leaf, kind in zip(accs, leaves, kinds, strict=True)
        ]

    return Slot(spec.name, init, update, merge, compute, delta)


def _check_observation(
    spec: MetricSpec,
    structures: tuple[Any, Any],
    kinds: tuple[tuple[bool, ...], tuple[bool, ...]],
) -> None:
    """Compares the structure of an observation, and which leaves have one value per example.

    Raises:
        ShapeError: They differ from those of the first batch.
    """
    found, expected = structures
    if structures_differ(found, expected):
        raise errors.ShapeError(
            f"{spec.title} must return {expected} for every batch, got {found}",
            fix="return the same structure for every batch",
        )
    # Whether a leading axis means examples was decided by the first batch. If the axis has the
    # length of the batch by chance, another batch shows it.
    if kinds[0] != kinds[1] and not callable(spec.accumulate):
        raise errors.ShapeError(
            f"{spec.title} must return one value per example for all batches or for none, got both",
            fix="pass per='example' or per='batch'",
        )


def _eval_shape(fn: Callable[[Inputs], _T], inputs: Inputs) -> _T:
    """Returns the shapes of ``fn(inputs)``. The batch is not traced, as only its axis is read."""

    # Lists, because JAX sorts the keys of a dict, and not all keys compare.
    def of_values(reported: list[PyTree], named: list[PyTree]) -> _T:
        return fn(
            Inputs(
                dict(zip(inputs.reported, reported, strict=True)),
                dict(zip(inputs.named, named, strict=True)),
                inputs.batch,
            )
        )

    return jax.eval_shape(of_values, list(inputs.reported.values()), list(inputs.named.values()))


def _once(slot: Slot, inputs: Inputs) -> PyTree:
    """Updates an empty accumulator once, and computes the value."""
    acc = strongly_typed(slot.init())
    if slot.delta is None:
        new = slot.update(acc, inputs)
    else:
        added = slot.delta(inputs)
        checked_nodes(slot.name, added, acc)
        new = merge_sums(acc, summed(added, acc))
    return slot.compute(cast_like(slot.name, new, acc))
