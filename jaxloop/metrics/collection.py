"""The metrics of a loop, bound to what its step reports: one accumulator tree and its functions.

    bound = Collection((declare("accuracy"),)).bind(outputs, step_state, batch)   # shapes only
    accs = bound.update(bound.init(), outputs, step_state, batch)                 # any batch size
    values = bound.compute(accs)

Invariant: accumulators are strongly typed arrays whose structure, shapes and dtypes are fixed by
`bind`, so that they can be carried through a loop; faults of names and shapes are raised by `bind`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxloop import errors
from jaxloop.metrics import accumulate, algebra, clu_protocol
from jaxloop.metrics.algebra import Metric
from jaxloop.metrics.declare import DEFAULT_FIELDS, Declared, built_in

SKIPPED = "skipped_steps"
"""What a step reports, as 0 or 1, that may leave its state unchanged; and the metric of it."""


@dataclass(frozen=True)
class _Slot:
    """One metric of a bound collection; ``update`` takes (acc, outputs, step_state, batch)."""

    name: str
    init: Callable[[], Any]
    update: Callable[[Any, Any, Any, Any], Any]
    merge: Callable[[Any, Any], Any]
    compute: Callable[[Any], Any]


@dataclass(frozen=True)
class Bound:
    """Metrics bound to the shapes of one loop; pure functions over ``{name: accumulator}``."""

    slots: tuple[_Slot, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics' names, in the order they were declared."""
        return tuple(slot.name for slot in self.slots)

    def init(self) -> dict[str, Any]:
        """Accumulators that have seen nothing."""
        return {slot.name: _strong(slot.init()) for slot in self.slots}

    def update(
        self, accs: Mapping[str, Any], outputs: Any, step_state: Any, batch: Any
    ) -> dict[str, Any]:
        """Accumulators that have also seen this batch, of any size; dtypes stay what they were.

        A step that reports `SKIPPED` has done nothing: only what counts such steps sees it.
        """
        new = {
            slot.name: _like(
                slot.name,
                slot.update(accs[slot.name], outputs, step_state, batch),
                accs[slot.name],
            )
            for slot in self.slots
        }
        skipped = _mapping(outputs).get(SKIPPED)
        if skipped is None:
            return new
        kept = jax.tree.map(lambda a, b: jnp.where(skipped, a, b), dict(accs), new)
        return {name: new[name] if name == SKIPPED else kept[name] for name in new}

    def merge(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        """Accumulators that have seen what both have, ``b`` being the later."""
        return {
            slot.name: _like(slot.name, slot.merge(a[slot.name], b[slot.name]), a[slot.name])
            for slot in self.slots
        }

    def compute(self, accs: Mapping[str, Any]) -> dict[str, Any]:
        """The value of each metric."""
        return {slot.name: slot.compute(accs[slot.name]) for slot in self.slots}


@dataclass(frozen=True)
class Collection:
    """Declared metrics; of two with one name the last counts.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxloop.metrics.declare import declare
        >>> outputs = {"y_true": jnp.array([0, 1]), "y_pred": jnp.array([0.2, 0.3])}
        >>> bound = Collection((declare("accuracy"),)).bind(outputs, {}, None)
        >>> accs = bound.update(bound.init(), outputs, {}, None)
        >>> float(bound.compute(accs)["accuracy"])
        0.5
    """

    declared: tuple[Declared, ...] = ()

    def bind(self, outputs: Any, step_state: Any, batch: Any) -> Bound:
        """The functions of these metrics, for a step that reports and carries these shapes.

        Args:
            outputs: What the step reports: a mapping of arrays or `jax.ShapeDtypeStruct`.
            step_state: What it carries.
            batch: A batch, of which only the number of examples is read.

        Returns:
            The bound metrics.

        Raises:
            UnknownNameError: A field is neither reported nor carried.
            ShapeError: Shapes do not fit, or a scalar came together with weights.
        """
        last = {declared.name: declared for declared in self.declared}
        merged = jax.tree.map(_spec, _merged(outputs, step_state))
        reported = jax.tree.map(_spec, _mapping(outputs))
        slots = []
        for declared in last.values():
            slot = _slot(declared, reported, merged, batch)
            # One abstract update now: its faults are raised before the first step.
            _abstract_update(slot, reported, merged, batch)
            slots.append(slot)
        return Bound(tuple(slots))


# --- one metric ----------------------------------------------------------------------------------


def _slot(declared: Declared, outputs: Any, merged: Any, batch: Any) -> _Slot:
    metric = declared.metric
    if declared.batch_mean:
        return _observed(declared, _observe_field(declared), outputs, merged, batch)
    if isinstance(metric, type):
        if declared.accumulate is None:
            return _clu(declared, outputs, merged, batch)
        return _observed(declared, _observe_clu(declared), outputs, merged, batch)
    if isinstance(metric, str):
        metric = built_in(metric)
    if isinstance(metric, Metric):
        if metric.weighted is not None and algebra.is_float_weight(_weight(outputs)):
            metric = metric.weighted
        if declared.accumulate is None:
            return _direct(declared, metric)
        return _observed(declared, _observe_metric(declared, metric), outputs, merged, batch)
    return _observed(declared, _observe_function(declared), outputs, merged, batch)


def _direct(declared: Declared, metric: Metric) -> _Slot:
    def update(acc: Any, outputs: Any, step_state: Any, batch: Any) -> Any:
        args = _extract(declared, _merged(outputs, step_state))
        return metric.update(acc, *args, weight=_weight(outputs))

    return _Slot(declared.name, metric.init, update, metric.merge, metric.compute)


# An observation: ``(outputs, merged, batch) -> (value, kinds, Batch)``, where value is a pytree and
# kinds says of each of its leaves whether it has one value per example.
Observation = Callable[[Any, Any, Any], tuple[Any, list[bool], accumulate.Batch]]


def _observe_function(declared: Declared) -> Observation:
    # Neither of these averages over examples, so a scalar is exact under them, mask or no mask.
    takes_scalars = declared.accumulate == "last" or callable(declared.accumulate)

    def observe(outputs: Any, merged: Any, batch: Any) -> tuple[Any, list[bool], accumulate.Batch]:
        args = _extract(declared, merged)
        weight = _weight(outputs)
        weighed = accumulate.make_batch(
            weight, _num_examples(args, weight, batch), _title(declared)
        )
        value = jax.tree.map(jnp.asarray, declared.metric(*args))
        kinds = []
        for leaf in jax.tree.leaves(value):
            if leaf.ndim == 0:
                if weight is not None and not takes_scalars:
                    raise algebra.scalar_with_weights(declared.name)
                kinds.append(False)
            elif leaf.shape[0] == weighed.num_examples:
                kinds.append(True)
            elif callable(declared.accumulate):
                kinds.append(False)
            else:
                raise errors.ShapeError(
                    f"{_title(declared)} returned shape {leaf.shape} for a batch of "
                    f"{weighed.num_examples} examples",
                    fix="return one value per example, or a scalar",
                )
        return value, kinds, weighed

    return observe


def _observe_metric(declared: Declared, metric: Metric) -> Observation:
    def observe(outputs: Any, merged: Any, batch: Any) -> tuple[Any, list[bool], accumulate.Batch]:
        args = _extract(declared, merged)
        weight = _weight(outputs)
        value = metric.compute(metric.update(metric.init(), *args, weight=weight))
        return _whole(declared, value, weight, _num_examples(args, weight, batch))

    return observe


def _observe_clu(declared: Declared) -> Observation:
    def observe(outputs: Any, merged: Any, batch: Any) -> tuple[Any, list[bool], accumulate.Batch]:
        keywords, num_examples = _clu_keywords(declared, outputs, merged, batch)
        value = clu_protocol.compute(clu_protocol.from_output(declared.metric, keywords))
        return _whole(declared, value, _weight(outputs), num_examples)

    return observe


def _observe_field(declared: Declared) -> Observation:
    def observe(outputs: Any, merged: Any, batch: Any) -> tuple[Any, list[bool], accumulate.Batch]:
        (value,) = _extract(declared, merged)
        if jnp.shape(value) != ():
            raise errors.ShapeError(
                f"{_title(declared)} must be its batch's mean, a scalar; got shape "
                f"{jnp.shape(value)}",
                fix="reduce the loss to a scalar first",
            )
        weight = _weight(outputs)
        return _whole(
            declared, value, weight, _num_examples(_mapping(outputs).get("y_true"), weight, batch)
        )

    return observe


def _whole(
    declared: Declared, value: Any, weight: Any, num_examples: int
) -> tuple[Any, list[bool], accumulate.Batch]:
    value = jax.tree.map(jnp.asarray, value)
    weighed = accumulate.make_batch(weight, num_examples, _title(declared))
    return value, [False] * len(jax.tree.leaves(value)), weighed


def _observed(
    declared: Declared, observe: Observation, outputs: Any, merged: Any, batch: Any
) -> _Slot:
    reduction = accumulate.reduction_of(declared.accumulate or "running_average")
    kinds: list[bool] = []

    def shapes(outputs: Any, merged: Any) -> Any:
        value, found, _ = observe(outputs, merged, batch)
        kinds[:] = found
        return value

    spec = jax.eval_shape(shapes, outputs, merged)
    specs, structure = jax.tree.flatten(spec)
    per_example = tuple(kinds)
    float_weights = algebra.is_float_weight(_weight(outputs))

    def init() -> list[Any]:
        return [
            reduction.init(spec, kind, float_weights)
            for spec, kind in zip(specs, per_example, strict=True)
        ]

    def update(acc: Any, outputs: Any, step_state: Any, batch: Any) -> list[Any]:
        value, found, weighed = observe(_mapping(outputs), _merged(outputs, step_state), batch)
        leaves, found_structure = jax.tree.flatten(value)
        if _differ(found_structure, structure):
            raise errors.ShapeError(
                f"{_title(declared)} returned {found_structure}, and {structure} before",
                fix="return the same structure for every batch",
            )
        # A batch of one is no exception: its kinds are those of the batch that was bound. But
        # where a leading axis happened to fit (or not), it must go on doing so.
        if tuple(found) != per_example and not callable(declared.accumulate):
            raise errors.ShapeError(
                f"{_title(declared)} returned one value per example for some batches only",
                fix="return one value per example, or a scalar, always",
            )
        return [
            reduction.update(old, leaf, kind, weighed)
            for old, leaf, kind in zip(acc, leaves, per_example, strict=True)
        ]

    def merge(a: Any, b: Any) -> list[Any]:
        return [reduction.merge(x, y) for x, y in zip(a, b, strict=True)]

    def compute(acc: Any) -> Any:
        return jax.tree.unflatten(structure, [reduction.compute(leaf) for leaf in acc])

    return _Slot(declared.name, init, update, merge, compute)


def _clu_keywords(
    declared: Declared, outputs: Any, merged: Any, batch: Any
) -> tuple[dict[str, Any], int]:
    given = declared.fields != DEFAULT_FIELDS
    args = _extract(declared, merged) if given else None
    weight = _weight(outputs)
    reported = _mapping(outputs)
    keywords = clu_protocol.model_output(declared.metric, reported, args, weight, declared.name)
    return keywords, _num_examples(args if given else keywords, weight, batch)


def _clu(declared: Declared, outputs: Any, merged: Any, batch: Any) -> _Slot:
    cls = declared.metric

    def instance(outputs: Any, merged: Any) -> Any:
        return clu_protocol.from_output(cls, _clu_keywords(declared, outputs, merged, batch)[0])

    # The protocol has no empty metric, so the accumulator says whether it holds one.
    spec = jax.eval_shape(instance, outputs, merged)
    twice = jax.eval_shape(clu_protocol.merge, spec, spec)
    if jax.tree.map(lambda x: x.shape, spec) != jax.tree.map(lambda x: x.shape, twice):
        raise errors.ShapeError(
            f"metric {declared.name!r}: {cls.__name__} grows as it merges, so it cannot be carried "
            "through a compiled loop",
            fix="use a metric whose state has a fixed shape",
        )

    def choose(seen: jax.Array, a: Any, b: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(seen, x.astype(y.dtype), y), a, b)

    def init() -> dict[str, Any]:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec)
        return {"state": zeros, "seen": jnp.zeros((), jnp.bool_)}

    def merge(a: Any, b: Any) -> dict[str, Any]:
        both = _like(declared.name, clu_protocol.merge(a["state"], b["state"]), a["state"])
        one = choose(a["seen"], a["state"], b["state"])
        return {
            "state": choose(a["seen"] & b["seen"], both, one),
            "seen": a["seen"] | b["seen"],
        }

    def update(acc: Any, outputs: Any, step_state: Any, batch: Any) -> dict[str, Any]:
        keywords, num_examples = _clu_keywords(
            declared, _mapping(outputs), _merged(outputs, step_state), batch
        )
        weighed = accumulate.make_batch(_weight(outputs), num_examples, _title(declared))
        state = _like(declared.name, clu_protocol.from_output(cls, keywords), acc["state"])
        return merge(acc, {"state": state, "seen": weighed.present})

    def compute(acc: Any) -> Any:
        value = jax.tree.map(jnp.asarray, clu_protocol.compute(acc["state"]))
        return jax.tree.map(
            lambda x: (
                jnp.where(acc["seen"], x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x
            ),
            value,
        )

    return _Slot(declared.name, init, update, merge, compute)


# --- looking up ----------------------------------------------------------------------------------


def _mapping(tree: Any) -> dict[str, Any]:
    return dict(tree) if isinstance(tree, Mapping) else {}


def _merged(outputs: Any, step_state: Any) -> dict[str, Any]:
    return {**_mapping(step_state), **_mapping(outputs)}


def _weight(outputs: Any) -> Any:
    return _mapping(outputs).get("sample_weight")


def _title(declared: Declared) -> str:
    return f"metric {declared.name!r}"


def _extract(declared: Declared, merged: Mapping[str, Any]) -> tuple[Any, ...]:
    if callable(declared.fields):
        args = declared.fields(merged)
        if not isinstance(args, (tuple, list)):
            raise errors.ArgumentTypeError(
                f"{_title(declared)}: its transform returned {type(args).__name__}",
                fix="return the list of the metric's arguments",
            )
        return tuple(args)
    for field in declared.fields:
        if field not in merged:
            raise errors.unknown_name(f"field of {_title(declared)}", field, map(str, merged))
    return tuple(merged[field] for field in declared.fields)


def _num_examples(args: Any, weight: Any, batch: Any) -> int:
    for candidate in (weight, args, batch):
        found = algebra.leading_axis(candidate)
        if found is not None:
            return found
    return 1


# --- fixed dtypes --------------------------------------------------------------------------------


def _differ(a: Any, b: Any) -> bool:
    return bool(a != b)


def _spec(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        struct: Any = jax.ShapeDtypeStruct
        return struct(leaf.shape, leaf.dtype)
    if isinstance(leaf, (bool, int, float, complex)):
        return jax.eval_shape(lambda: jnp.asarray(leaf))
    return leaf


def _strong(tree: Any) -> Any:
    """Arrays without weak types: a loop's carry must come back as it went in."""

    def strong(leaf: Any) -> jax.Array:
        array = jnp.asarray(leaf)
        return lax.convert_element_type(array, array.dtype)

    return jax.tree.map(strong, tree)


def _like(name: str, new: Any, old: Any) -> Any:
    """``new`` in the dtypes of ``old``, having its structure and shapes."""
    if _differ(jax.tree.structure(new), jax.tree.structure(old)):
        raise errors.ShapeError(
            f"metric {name!r}: its accumulator became {jax.tree.structure(new)}, and was "
            f"{jax.tree.structure(old)}",
            fix="return from update and merge what init returned",
        )

    def cast(new_leaf: Any, old_leaf: Any) -> jax.Array:
        array, dtype = jnp.asarray(new_leaf), old_leaf.dtype
        narrowed = jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(
            dtype, jnp.floating
        )
        if array.shape != old_leaf.shape or narrowed:
            raise errors.ShapeError(
                f"metric {name!r}: its accumulator became {array.dtype}{list(array.shape)}, and "
                f"was {dtype}{list(old_leaf.shape)}",
                fix="an accumulator has one shape and dtype, whatever the batch's size",
            )
        return lax.convert_element_type(array, dtype)

    return jax.tree.map(cast, new, old)


def _abstract_update(slot: _Slot, outputs: Any, merged: Any, batch: Any) -> None:
    def once(outputs: Any, merged: Any) -> Any:
        acc = _strong(slot.init())
        return slot.compute(_like(slot.name, slot.update(acc, outputs, merged, batch), acc))

    jax.eval_shape(once, outputs, merged)
