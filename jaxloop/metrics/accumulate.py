"""Reductions of observations over an epoch: average, sum, min, max, last, or one's own.

    reduction = reduction_of("running_average")
    acc = reduction.init(spec, True, False)
    acc = reduction.update(acc, value, True, Batch(weight, num_examples, total, present))

An observation is one array: one value per example, or one for its batch. Invariant: examples and
batches of weight 0 add nothing, and before the first update every floating value is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxloop import errors
from jaxloop.metrics import algebra

NAMES = ("running_average", "running_sum", "running_min", "running_max", "last")

CustomFn = Callable[[Any, Any, Any], Any]


class Batch(NamedTuple):
    """What the observations of one batch weigh.

    Attributes:
        weight: ``(batch,)`` or None.
        num_examples: The length of the batch axis, static.
        total: The sum of the weights, or the number of examples.
        present: Whether that is not 0.
    """

    weight: jax.Array | None
    num_examples: int
    total: algebra.Pair
    present: jax.Array


def make_batch(weight: Any, num_examples: int, where: str) -> Batch:
    """The weights of a batch, checked."""
    array = algebra.check_weight(weight, num_examples, where)
    total = algebra.sum_weights(array, num_examples)
    return Batch(array, num_examples, total, total.hi != 0)


@dataclass(frozen=True)
class Reduction:
    """How the observations of one leaf become one value.

    Attributes:
        init: ``(spec, per_example, float_weights) -> acc``; ``spec`` has shape and dtype of an
            observation, with the batch axis where there is one.
        update: ``(acc, observation, per_example, batch) -> acc``.
        merge: ``(acc, acc) -> acc``, the second being the later one.
        compute: ``acc -> value``.
    """

    init: Callable[[Any, bool, bool], Any]
    update: Callable[[Any, jax.Array, bool, Batch], Any]
    merge: Callable[[Any, Any], Any]
    compute: Callable[[Any], jax.Array]


def reduction_of(accumulate: str | CustomFn) -> Reduction:
    """The reduction of that name, or the one that ``(acc, obs, i) -> acc`` makes."""
    if callable(accumulate):
        return _custom(accumulate)
    return {
        "running_average": _AVERAGE,
        "running_sum": _SUM,
        "running_min": _extremum(largest=False),
        "running_max": _extremum(largest=True),
        "last": _LAST,
    }[accumulate]


def _is_integer(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.integer)) or dtype == jnp.bool_


def _rest(spec: Any, per_example: bool) -> tuple[int, ...]:
    return tuple(spec.shape[1:]) if per_example else tuple(spec.shape)


def _or_nan(seen: jax.Array, value: jax.Array) -> jax.Array:
    # An integer has no NaN; its start value is all there is to show.
    return value if _is_integer(value.dtype) else jnp.where(seen, value, jnp.nan)


def _plain(value: jax.Array, batch: Batch) -> algebra.Pair:
    """A batch's one value as a pair, 0 where the batch weighs nothing."""
    value = jnp.where(batch.present, value, jnp.zeros((), value.dtype))
    return algebra.sum_examples(value[None], None)


# --- average -------------------------------------------------------------------------------------


def _average_init(spec: Any, per_example: bool, float_weights: bool) -> Any:
    return {"sum": algebra.zero_pair(_rest(spec, per_example)), "weight": algebra.zero_pair()}


def _average_update(acc: Any, value: jax.Array, per_example: bool, batch: Batch) -> Any:
    if per_example:
        new = algebra.sum_examples(value, batch.weight)
    else:
        new = algebra.sum_examples(value[None], batch.total.hi[None])
    return {
        "sum": algebra.add_pairs(acc["sum"], new),
        "weight": algebra.add_pairs(acc["weight"], batch.total),
    }


_AVERAGE = Reduction(
    _average_init,
    _average_update,
    algebra.merge_pairs,
    lambda acc: algebra.divide_pairs(acc["sum"], acc["weight"], jnp.nan),
)


# --- sum -----------------------------------------------------------------------------------------


def _sum_init(spec: Any, per_example: bool, float_weights: bool) -> Any:
    shape = _rest(spec, per_example)
    integer = _is_integer(spec.dtype) and not (float_weights and per_example)
    total = jnp.zeros(shape, jnp.int32) if integer else algebra.zero_pair(shape)
    return {"sum": total, "seen": jnp.zeros((), jnp.bool_)}


def _sum_update(acc: Any, value: jax.Array, per_example: bool, batch: Batch) -> Any:
    seen = acc["seen"] | batch.present
    if isinstance(acc["sum"], algebra.Pair):
        # A batch's one value is added as it is: a sum is already over its examples.
        new = algebra.sum_examples(value, batch.weight) if per_example else _plain(value, batch)
        return {"sum": algebra.add_pairs(acc["sum"], new), "seen": seen}
    value = value.astype(jnp.int32)
    if not per_example:
        value = jnp.where(batch.present, value, 0)
    else:
        if batch.weight is not None:
            weight = batch.weight.astype(jnp.int32)
            value = value * weight.reshape(weight.shape + (1,) * (value.ndim - 1))
        value = jnp.sum(value, axis=0, dtype=jnp.int32)
    return {"sum": acc["sum"] + value, "seen": seen}


def _sum_merge(a: Any, b: Any) -> Any:
    pair = isinstance(a["sum"], algebra.Pair)
    total = algebra.add_pairs(a["sum"], b["sum"]) if pair else a["sum"] + b["sum"]
    return {"sum": total, "seen": a["seen"] | b["seen"]}


def _sum_compute(acc: Any) -> jax.Array:
    total = acc["sum"]
    return _or_nan(acc["seen"], total.hi if isinstance(total, algebra.Pair) else total)


_SUM = Reduction(_sum_init, _sum_update, _sum_merge, _sum_compute)


# --- min and max ---------------------------------------------------------------------------------


def _extremum(*, largest: bool) -> Reduction:
    pick = jnp.maximum if largest else jnp.minimum
    over_axis = jnp.max if largest else jnp.min

    def identity(dtype: Any) -> Any:
        if _is_integer(dtype):
            limits = np.iinfo(np.dtype(dtype))
            return limits.min if largest else limits.max
        return -jnp.inf if largest else jnp.inf

    def numbers(value: jax.Array) -> jax.Array:
        return value.astype(jnp.int32) if value.dtype == jnp.bool_ else value

    def init(spec: Any, per_example: bool, float_weights: bool) -> Any:
        dtype = jnp.dtype(jnp.int32) if spec.dtype == jnp.bool_ else spec.dtype
        value = jnp.full(_rest(spec, per_example), identity(dtype), dtype)
        return {"value": value, "seen": jnp.zeros((), jnp.bool_)}

    def update(acc: Any, value: jax.Array, per_example: bool, batch: Batch) -> Any:
        value = numbers(value)
        seen = batch.present
        if per_example:
            if batch.weight is not None:
                some = batch.weight.astype(jnp.bool_)
                seen = jnp.any(some)
                shaped = some.reshape(some.shape + (1,) * (value.ndim - 1))
                value = jnp.where(shaped, value, jnp.asarray(identity(value.dtype), value.dtype))
            value = over_axis(value, axis=0) if batch.num_examples else acc["value"]
        else:
            value = jnp.where(seen, value, jnp.asarray(identity(value.dtype), value.dtype))
        return {"value": pick(acc["value"], value), "seen": acc["seen"] | seen}

    def merge(a: Any, b: Any) -> Any:
        return {"value": pick(a["value"], b["value"]), "seen": a["seen"] | b["seen"]}

    return Reduction(init, update, merge, lambda acc: _or_nan(acc["seen"], acc["value"]))


# --- last ----------------------------------------------------------------------------------------


def _last_init(spec: Any, per_example: bool, float_weights: bool) -> Any:
    # The average of a batch's examples is a float, whatever they are.
    dtype = jnp.float32 if per_example else spec.dtype
    return {
        "value": jnp.zeros(_rest(spec, per_example), dtype),
        "seen": jnp.zeros((), jnp.bool_),
    }


def _last_update(acc: Any, value: jax.Array, per_example: bool, batch: Batch) -> Any:
    if per_example:
        total = algebra.sum_examples(value, batch.weight)
        value = algebra.divide_pairs(total, batch.total, jnp.nan)
    return {
        "value": jnp.where(batch.present, value, acc["value"]),
        "seen": acc["seen"] | batch.present,
    }


def _last_merge(a: Any, b: Any) -> Any:
    return {
        "value": jnp.where(b["seen"], b["value"], a["value"]),
        "seen": a["seen"] | b["seen"],
    }


_LAST = Reduction(
    _last_init, _last_update, _last_merge, lambda acc: _or_nan(acc["seen"], acc["value"])
)


# --- one's own -----------------------------------------------------------------------------------


def _custom(fn: CustomFn) -> Reduction:
    def init(spec: Any, per_example: bool, float_weights: bool) -> Any:
        return {
            "value": jnp.zeros(spec.shape, spec.dtype),
            "iteration": jnp.zeros((), jnp.int32),
        }

    def update(acc: Any, value: jax.Array, per_example: bool, batch: Batch) -> Any:
        old = acc["value"]
        if value.shape != old.shape:
            raise errors.ShapeError(
                f"the accumulate function is given shape {value.shape} where it began with "
                f"{old.shape}",
                fix="observe something whose shape does not depend on the batch's size",
            )
        new = jnp.asarray(fn(old, value, acc["iteration"]))
        if new.shape != old.shape or (_is_integer(old.dtype) and not _is_integer(new.dtype)):
            raise errors.ShapeError(
                f"the accumulate function returned {new.dtype}{list(new.shape)}, and its "
                f"accumulator is {old.dtype}{list(old.shape)}",
                fix="return what the accumulator is: zeros like the observation",
            )
        return {
            "value": lax.convert_element_type(new, old.dtype),
            "iteration": acc["iteration"] + 1,
        }

    def merge(a: Any, b: Any) -> Any:
        raise errors.ArgumentError(
            "a metric with its own accumulate function cannot be merged: (acc, obs, i) does not "
            "say how two accumulators become one",
            fix="use a Metric, which has a merge",
        )

    return Reduction(init, update, merge, lambda acc: _or_nan(acc["iteration"] != 0, acc["value"]))
