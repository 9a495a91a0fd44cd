"""Reductions over the batches of an epoch: average, sum, minimum, maximum, last, or a function.

    reduction = reduction_of("running_average")
    acc = reduction.init(shape, per_example=True, float_weights=False)
    acc = reduction.update(acc, value, True, batch_weights(weight, num_examples, "metric 'mine'"))
    result = reduction.compute(acc)

An observation is one array, either one value per example or one value for its batch. Invariant:
examples and batches of weight 0 add nothing, and before the first update every floating-point
result is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.metrics.exact_sum import (
    Pair,
    add_pairs,
    divide_pairs,
    merge_pairs,
    sum_examples,
    zero_pair,
)
from jaxloop.metrics.weights import BatchWeights

AccumulateName = Literal["running_average", "running_sum", "running_min", "running_max", "last"]

NAMES: tuple[str, ...] = get_args(AccumulateName)

AccumulateFn = Callable[[jax.Array, jax.Array, jax.Array], ArrayLike]
"""``(acc, observation, iteration) -> acc``."""


class _Init(Protocol):
    def __call__(
        self, shape: jax.ShapeDtypeStruct, per_example: bool, float_weights: bool
    ) -> PyTree: ...


@dataclass(frozen=True)
class Reduction:
    """A way to reduce the observations of one leaf to one value.

    Attributes:
        init: ``(shape, per_example, float_weights) -> acc``, where ``shape`` is the
            `jax.ShapeDtypeStruct` of an observation, including the batch axis if it has one.
        update: ``(acc, observation, per_example, weights) -> acc``.
        merge: ``(acc, later_acc) -> acc``.
        compute: ``acc -> value``.
    """

    init: _Init
    update: Callable[[PyTree, jax.Array, bool, BatchWeights], PyTree]
    merge: Callable[[PyTree, PyTree], PyTree]
    compute: Callable[[PyTree], jax.Array]


def reduction_of(accumulate: str | AccumulateFn) -> Reduction:
    """Returns the reduction of one of `NAMES`, or one made from ``(acc, obs, i) -> acc``."""
    if callable(accumulate):
        return _custom(accumulate)
    return {
        "running_average": _AVERAGE,
        "running_sum": _SUM,
        "running_min": _extremum(largest=False),
        "running_max": _extremum(largest=True),
        "last": _LAST,
    }[accumulate]


def _is_integer(dtype: DTypeLike) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.integer)) or dtype == jnp.bool_


def _rest(shape: jax.ShapeDtypeStruct, per_example: bool) -> tuple[int, ...]:
    return tuple(shape.shape[1:]) if per_example else tuple(shape.shape)


def _or_nan(seen: jax.Array, value: jax.Array) -> jax.Array:
    # Integers have no NaN, so before the first update an integer shows its start value.
    return value if _is_integer(value.dtype) else jnp.where(seen, value, jnp.nan)


def _one_value(value: jax.Array, weights: BatchWeights) -> Pair:
    """Returns a batch's one value as a pair, or 0 if its weights are all 0."""
    value = jnp.where(weights.present, value, jnp.zeros((), value.dtype))
    return sum_examples(value[None], None)


# --- average -------------------------------------------------------------------------------------


def _average_init(shape: jax.ShapeDtypeStruct, per_example: bool, float_weights: bool) -> PyTree:
    return {"sum": zero_pair(_rest(shape, per_example)), "weight": zero_pair()}


def _average_update(
    acc: PyTree, value: jax.Array, per_example: bool, weights: BatchWeights
) -> PyTree:
    if per_example:
        new = sum_examples(value, weights.weight)
    else:
        new = sum_examples(value[None], weights.total.hi[None])
    return {
        "sum": add_pairs(acc["sum"], new),
        "weight": add_pairs(acc["weight"], weights.total),
    }


_AVERAGE = Reduction(
    _average_init,
    _average_update,
    merge_pairs,
    lambda acc: divide_pairs(acc["sum"], acc["weight"], jnp.nan),
)


# --- sum -----------------------------------------------------------------------------------------


def _sum_init(shape: jax.ShapeDtypeStruct, per_example: bool, float_weights: bool) -> PyTree:
    rest = _rest(shape, per_example)
    integer = _is_integer(shape.dtype) and not (float_weights and per_example)
    total = jnp.zeros(rest, jnp.int32) if integer else zero_pair(rest)
    return {"sum": total, "seen": jnp.zeros((), jnp.bool_)}


def _sum_update(acc: PyTree, value: jax.Array, per_example: bool, weights: BatchWeights) -> PyTree:
    seen = acc["seen"] | weights.present
    if isinstance(acc["sum"], Pair):
        # A batch's one value is added unweighted, because it is already a value for all examples.
        new = sum_examples(value, weights.weight) if per_example else _one_value(value, weights)
        return {"sum": add_pairs(acc["sum"], new), "seen": seen}
    value = value.astype(jnp.int32)
    if not per_example:
        value = jnp.where(weights.present, value, 0)
    else:
        if weights.weight is not None:
            weight = weights.weight.astype(jnp.int32)
            value = value * weight.reshape(weight.shape + (1,) * (value.ndim - 1))
        value = jnp.sum(value, axis=0, dtype=jnp.int32)
    return {"sum": acc["sum"] + value, "seen": seen}


def _sum_merge(a: PyTree, b: PyTree) -> PyTree:
    pair = isinstance(a["sum"], Pair)
    total = add_pairs(a["sum"], b["sum"]) if pair else a["sum"] + b["sum"]
    return {"sum": total, "seen": a["seen"] | b["seen"]}


def _sum_compute(acc: PyTree) -> jax.Array:
    total = acc["sum"]
    return _or_nan(acc["seen"], total.hi if isinstance(total, Pair) else total)


_SUM = Reduction(_sum_init, _sum_update, _sum_merge, _sum_compute)


# --- minimum and maximum -------------------------------------------------------------------------


def _extremum(*, largest: bool) -> Reduction:
    pick = jnp.maximum if largest else jnp.minimum
    over_axis = jnp.max if largest else jnp.min

    def identity(dtype: DTypeLike) -> float:
        if _is_integer(dtype):
            limits = np.iinfo(np.dtype(dtype))
            return limits.min if largest else limits.max
        return -jnp.inf if largest else jnp.inf

    def init(shape: jax.ShapeDtypeStruct, per_example: bool, float_weights: bool) -> PyTree:
        dtype = jnp.dtype(jnp.int32) if shape.dtype == jnp.bool_ else shape.dtype
        value = jnp.full(_rest(shape, per_example), identity(dtype), dtype)
        return {"value": value, "seen": jnp.zeros((), jnp.bool_)}

    def update(acc: PyTree, value: jax.Array, per_example: bool, weights: BatchWeights) -> PyTree:
        value = value.astype(jnp.int32) if value.dtype == jnp.bool_ else value
        seen = weights.present
        if per_example:
            if weights.weight is not None:
                some = weights.weight.astype(jnp.bool_)
                seen = jnp.any(some)
                shaped = some.reshape(some.shape + (1,) * (value.ndim - 1))
                value = jnp.where(shaped, value, jnp.asarray(identity(value.dtype), value.dtype))
            value = over_axis(value, axis=0) if weights.num_examples else acc["value"]
        else:
            value = jnp.where(seen, value, jnp.asarray(identity(value.dtype), value.dtype))
        return {"value": pick(acc["value"], value), "seen": acc["seen"] | seen}

    def merge(a: PyTree, b: PyTree) -> PyTree:
        return {"value": pick(a["value"], b["value"]), "seen": a["seen"] | b["seen"]}

    return Reduction(init, update, merge, lambda acc: _or_nan(acc["seen"], acc["value"]))


# --- last ----------------------------------------------------------------------------------------


def _last_init(shape: jax.ShapeDtypeStruct, per_example: bool, float_weights: bool) -> PyTree:
    # The average over a batch's examples is a float, even if the examples are integers.
    dtype = jnp.float32 if per_example else shape.dtype
    return {
        "value": jnp.zeros(_rest(shape, per_example), dtype),
        "seen": jnp.zeros((), jnp.bool_),
    }


def _last_update(acc: PyTree, value: jax.Array, per_example: bool, weights: BatchWeights) -> PyTree:
    if per_example:
        total = sum_examples(value, weights.weight)
        value = divide_pairs(total, weights.total, jnp.nan)
    return {
        "value": jnp.where(weights.present, value, acc["value"]),
        "seen": acc["seen"] | weights.present,
    }


def _last_merge(a: PyTree, b: PyTree) -> PyTree:
    return {
        "value": jnp.where(b["seen"], b["value"], a["value"]),
        "seen": a["seen"] | b["seen"],
    }


_LAST = Reduction(
    _last_init, _last_update, _last_merge, lambda acc: _or_nan(acc["seen"], acc["value"])
)


# --- a function of the user's --------------------------------------------------------------------


def _custom(fn: AccumulateFn) -> Reduction:
    def init(shape: jax.ShapeDtypeStruct, per_example: bool, float_weights: bool) -> PyTree:
        return {
            "value": jnp.zeros(shape.shape, shape.dtype),
            "iteration": jnp.zeros((), jnp.int32),
        }

    def update(acc: PyTree, value: jax.Array, per_example: bool, weights: BatchWeights) -> PyTree:
        old = acc["value"]
        if value.shape != old.shape:
            raise errors.ShapeError(
                f"the observation for an accumulate function must have shape {old.shape} in every "
                f"batch, got {value.shape}",
                fix="observe a value whose shape does not depend on the size of the batch",
            )
        new = jnp.asarray(fn(old, value, acc["iteration"]))
        if new.shape != old.shape or (_is_integer(old.dtype) and not _is_integer(new.dtype)):
            raise errors.ShapeError(
                f"the accumulate function must return {old.dtype}{list(old.shape)} like its "
                f"accumulator, got {new.dtype}{list(new.shape)}",
                fix="return an array like the accumulator, which starts as zeros like the "
                "observation",
            )
        return {
            "value": lax.convert_element_type(new, old.dtype),
            "iteration": acc["iteration"] + 1,
        }

    def merge(a: PyTree, b: PyTree) -> PyTree:
        raise errors.ArgumentError(
            "a metric with an accumulate function cannot be merged, because (acc, obs, i) -> acc "
            "does not combine two accumulators",
            fix="use a Metric, which has a merge function",
        )

    return Reduction(init, update, merge, lambda acc: _or_nan(acc["iteration"] != 0, acc["value"]))
