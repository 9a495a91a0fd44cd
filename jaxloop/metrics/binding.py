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
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.metrics import clu_protocol
from jaxloop.metrics.accumulators import cast_like, strongly_typed, structures_differ
from jaxloop.metrics.clu_protocol import CluMetric
from jaxloop.metrics.declare import (
    DEFAULT_FIELDS,
    TAKES_PAIRS,
    BatchMean,
    Derived,
    EachScalar,
    MetricSpec,
    named_metric,
)
from jaxloop.metrics.derived import in_order, with_derived
from jaxloop.metrics.exact_int import is_exact
from jaxloop.metrics.inputs import Inputs
from jaxloop.metrics.metric import Metric, updated
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
from jaxloop.metrics.weights import batch_weights, is_float_weight

SKIPPED = "skipped_steps"
"""The name of the output, 0 or 1, of a step that may leave its state unchanged, and of the metric
that counts it."""

_NOT_METRICS = frozenset({"sample_weight", "num_examples", SKIPPED})
"""The outputs that say how to accumulate the others."""

Accumulators = dict[str, PyTree]
"""One accumulator for each metric, by name."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Slot:
    """One metric that is bound to its inputs."""

    name: str
    init: Callable[[], PyTree]
    update: Callable[[PyTree, Inputs], PyTree]
    merge: Callable[[PyTree, PyTree], PyTree]
    compute: Callable[[PyTree], PyTree]


@dataclass(frozen=True)
class Metrics:
    """Metrics that are bound to the names and shapes of one loop; see `bind`.

    Attributes:
        slots: The accumulated metrics, in the order in which they were declared.
        derived: The derived metrics, each after those that it reads.
    """

    slots: tuple[_Slot, ...]
    derived: tuple[tuple[str, Derived], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the values, the derived ones last."""
        return tuple(slot.name for slot in self.slots) + tuple(name for name, _ in self.derived)

    def init(self) -> Accumulators:
        """Returns empty accumulators."""
        return {slot.name: strongly_typed(slot.init()) for slot in self.slots}

    def update(
        self, accs: Mapping[str, PyTree], outputs: PyTree, step_state: PyTree, batch: PyTree
    ) -> Accumulators:
        """Adds a batch of any size to the accumulators.

        If the step reports `SKIPPED` as 1, only the metric of that name changes.

        Args:
            accs: The accumulators.
            outputs: The outputs that the step reports.
            step_state: The step state.
            batch: The batch. Only its number of examples is read.

        Raises:
            ShapeError: A metric returned another structure, shape or dtype than in `bind`.
        """
        inputs = Inputs.of(outputs, step_state, batch)
        new = {
            slot.name: cast_like(slot.name, slot.update(accs[slot.name], inputs), accs[slot.name])
            for slot in self.slots
        }
        skipped = inputs.reported.get(SKIPPED)
        if skipped is None:
            return new
        chosen = jax.tree.map(lambda a, b: jnp.where(skipped, a, b), dict(accs), new)
        return {name: new[name] if name == SKIPPED else chosen[name] for name in new}

    def merge(self, a: Mapping[str, PyTree], b: Mapping[str, PyTree]) -> Accumulators:
        """Combines two sets of accumulators, where ``b`` is the later one."""
        return {
            slot.name: cast_like(slot.name, slot.merge(a[slot.name], b[slot.name]), a[slot.name])
            for slot in self.slots
        }

    def compute(self, accs: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Returns the value of each accumulated metric by name.

        Exact integers and their quotients are an `ExactInt` and an `ExactRatio`. `host_rows`
        converts them.
        """
        return {slot.name: slot.compute(accs[slot.name]) for slot in self.slots}

    def with_derived(self, values: dict[str, PyTree]) -> dict[str, PyTree]:
        """Returns values on the host together with those of the derived metrics."""
        return with_derived(self.derived, values) if self.derived else values


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


def _bind_one(spec: MetricSpec, inputs: Inputs) -> _Slot:
    if spec.where is not None:
        weight = _eval_shape(lambda inputs: inputs.masked(spec).sample_weight, inputs)
        reported = {**inputs.reported, "sample_weight": weight}
        slot = _bind_one(
            dataclasses.replace(spec, where=None), dataclasses.replace(inputs, reported=reported)
        )
        return dataclasses.replace(
            slot, update=lambda acc, inputs: slot.update(acc, inputs.masked(spec))
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


def _bind_metric(spec: MetricSpec, metric: Metric) -> _Slot:
    def update(acc: PyTree, inputs: Inputs) -> PyTree:
        return updated(metric, acc, inputs.arguments(spec), inputs.weight, spec.title)

    return _Slot(spec.name, metric.init, update, metric.merge, metric.compute)


def _bind_clu(spec: MetricSpec, cls: type[CluMetric], keywords: dict[str, PyTree]) -> _Slot:
    shapes = jax.eval_shape(functools.partial(clu_protocol.from_output, cls), keywords)
    metric = clu_protocol.clu_metric(cls, shapes, spec.name)

    def update(acc: PyTree, inputs: Inputs) -> PyTree:
        keywords, num_examples = clu_keywords(spec, cls, inputs)
        weights = batch_weights(inputs.weight, num_examples, spec.title)
        return metric.update(acc, keywords, weight=weights.present)

    return _Slot(spec.name, metric.init, update, metric.merge, metric.compute)


def _bind_observations(spec: MetricSpec, observe: Observe, inputs: Inputs) -> _Slot:
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

    def update(acc: list[PyTree], inputs: Inputs) -> list[PyTree]:
        value, found, weights = observe(inputs)
        leaves, found_structure = jax.tree.flatten(value, is_leaf=is_exact)
        if structures_differ(found_structure, structure):
            raise errors.ShapeError(
                f"{spec.title} must return {structure} for every batch, got {found_structure}",
                fix="return the same structure for every batch",
            )
        # Whether a leading axis means examples was decided by the first batch. If the axis has the
        # length of the batch by chance, another batch shows it.
        if tuple(found) != kinds and not callable(spec.accumulate):
            raise errors.ShapeError(
                f"{spec.title} must return one value per example for all batches or for none, got "
                "both",
                fix="pass per='example' or per='batch'",
            )
        return [
            reduction.update(old, leaf, kind, weights)
            for old, leaf, kind in zip(acc, leaves, kinds, strict=True)
        ]

    def merge(a: list[PyTree], b: list[PyTree]) -> list[PyTree]:
        return [reduction.merge(x, y) for x, y in zip(a, b, strict=True)]

    def compute(acc: list[PyTree]) -> PyTree:
        return jax.tree.unflatten(structure, [reduction.compute(leaf) for leaf in acc])

    return _Slot(spec.name, init, update, merge, compute)


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


def _once(slot: _Slot, inputs: Inputs) -> PyTree:
    """Updates an empty accumulator once, and computes the value."""
    acc = strongly_typed(slot.init())
    return slot.compute(cast_like(slot.name, slot.update(acc, inputs), acc))
