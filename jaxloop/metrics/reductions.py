"""Reductions over the batches of an epoch: average, window, sum, extremum, last, or a function.

    reduction = reduction_of("running_average")
    acc = reduction.init(shape, per_example=True, float_weights=False)
    acc = reduction.update(acc, value, True, batch_weights(weight, num_examples, "metric 'mine'"))
    result = reduction.compute(acc)

An observation is one array, either one value per example or one value for its batch. Invariant:
examples and batches of weight 0 add nothing, integers are exact, half-precision floats are
accumulated as float32, and before the first update every floating-point result is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.metrics import windows
from jaxloop.metrics.exact_int import (
    ExactInt,
    ExactRatio,
    exact_int,
    extreme_int,
    is_integer,
    less_int,
    multiply_ints,
    sum_ints,
    sum_limbs,
    where_int,
    zero_int,
)
from jaxloop.metrics.exact_sum import (
    Pair,
    divide_pairs,
    float_dtype,
    sum_examples,
    zero_pair,
)
from jaxloop.metrics.sums import Examples, merge_sums, summed
from jaxloop.metrics.weights import BatchWeights
from jaxloop.metrics.windows import Window

AccumulateName = Literal["running_average", "running_sum", "running_min", "running_max", "last"]

NAMES: tuple[str, ...] = get_args(AccumulateName)

AccumulateFn = Callable[[jax.Array, jax.Array, jax.Array], ArrayLike]
"""``(acc, observation, iteration) -> acc``."""

Observed = jax.Array | ExactInt
"""An observation. Only a `Metric` that counts is observed as an `ExactInt`, one for its batch."""

Shape = jax.ShapeDtypeStruct | ExactInt
"""The shape and dtype of an observation; an `ExactInt` holds those of its limbs."""


class _Init(Protocol):
    def __call__(self, shape: Shape, per_example: bool, float_weights: bool) -> PyTree: ...


@dataclass(frozen=True)
class Reduction:
    """A way to reduce the observations of one leaf to one value.

    Attributes:
        init: ``(shape, per_example, float_weights) -> acc``, where ``shape`` is that of an
            observation, including the batch axis if it has one.
        update: ``(acc, observation, per_example, weights) -> acc``.
        merge: ``(acc, later_acc) -> acc``.
        compute: ``acc -> value``.
        delta: What a batch adds to an accumulator that is a sum, or None. The arguments are those
            of ``update``, which may be shapes in place of ``acc``; see `jaxloop.metrics.sums`.
    """

    init: _Init
    update: Callable[[PyTree, Observed, bool, BatchWeights], PyTree]
    merge: Callable[[PyTree, PyTree], PyTree]
    compute: Callable[[PyTree], PyTree]
    delta: Callable[[PyTree, Observed, bool, BatchWeights], PyTree] | None = None


def _of_sums(
    init: _Init,
    delta: Callable[[PyTree, Observed, bool, BatchWeights], PyTree],
    compute: Callable[[PyTree], PyTree],
) -> Reduction:
    """Returns a reduction whose accumulator is a sum."""

    def update(acc: PyTree, value: Observed, per_example: bool, weights: BatchWeights) -> PyTree:
        return merge_sums(acc, summed(delta(acc, value, per_example, weights), acc))

    return Reduction(init, update, merge_sums, compute, delta)


def reduction_of(accumulate: str | Window | AccumulateFn) -> Reduction:
    """Returns the reduction of one of `NAMES`, of a window, or one of ``(acc, obs, i) -> acc``."""
    if isinstance(accumulate, Window):
        return _average_of(accumulate)
    if callable(accumulate):
        return _custom(accumulate)
    return {
        "running_average": _AVERAGE,
        "running_sum": _SUM,
        "running_min": _extremum(largest=False),
        "running_max": _extremum(largest=True),
        "last": _LAST,
    }[accumulate]


def _is_discrete(shape: Shape | Observed) -> bool:
    """Returns whether an observation is an integer or a bool, whose sums are exact integers."""
    return is_integer(shape.dtype) or shape.dtype == jnp.bool_


def _rest(shape: Shape, per_example: bool) -> tuple[int, ...]:
    return tuple(shape.shape[1:]) if per_example else tuple(shape.shape)


def _or_nan(seen: jax.Array, value: PyTree) -> PyTree:
    # Integers have no NaN, so before the first update an integer shows its start value.
    if isinstance(value, ExactInt) or _is_discrete(value):
        return value
    return jnp.where(seen, value, jnp.nan)


def _wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns float32 for half-precision floats, and any other dtype unchanged."""
    half = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.dtype(jnp.float32) if half else jnp.dtype(dtype)


def _zero(rest: tuple[int, ...], *, exact: bool) -> Pair | ExactInt:
    return zero_int(rest, num_limbs=sum_limbs()) if exact else zero_pair(rest)


def _where(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


# --- average -------------------------------------------------------------------------------------


def _averages_exactly(shape: Shape, float_weights: bool) -> bool:
    # The mean of bools is a fraction such as an accuracy, for which a float is precise enough.
    return is_integer(shape.dtype) and not float_weights


def _average_init(shape: Shape, per_example: bool, float_weights: bool) -> PyTree:
    exact = _averages_exactly(shape, float_weights)
    return {"sum": _zero(_rest(shape, per_example), exact=exact), "weight": _zero((), exact=exact)}


def _of_batch(acc: PyTree, value: Observed, per_example: bool, weights: BatchWeights) -> PyTree:
    """Returns what one batch adds to ``acc``."""
    if isinstance(acc["sum"], ExactInt):
        weight = weights.weight
        ones = jnp.ones(weights.num_examples, jnp.bool_) if weight is None else weight
        total = sum_ints(ones, None, sum_limbs())
        if per_example:
            assert not isinstance(value, ExactInt)
            return {"sum": Examples(value, weight), "weight": total}
        number = exact_int(value, sum_limbs())
        factor = jax.tree.map(lambda x: jnp.broadcast_to(x, number.shape), total)
        return {"sum": multiply_ints(number, factor), "weight": total}
    assert not isinstance(value, ExactInt)
    if per_example:
        return {"sum": Examples(value, weights.weight), "weight": weights.total}
    return {"sum": sum_examples(value[None], weights.total.hi[None]), "weight": weights.total}


def _average_compute(acc: PyTree) -> PyTree:
    if isinstance(acc["sum"], ExactInt):
        return ExactRatio(acc["sum"], acc["weight"])
    return divide_pairs(acc["sum"], acc["weight"], jnp.nan)


_AVERAGE = _of_sums(_average_init, _of_batch, _average_compute)


def _average_of(window: Window) -> Reduction:
    """Returns the average over the last batches. An entry is the accumulator of one batch."""

    def init(shape: Shape, per_example: bool, float_weights: bool) -> PyTree:
        return windows.empty_entries(window.n, _average_init(shape, per_example, float_weights))

    def update(acc: PyTree, value: Observed, per_example: bool, weights: BatchWeights) -> PyTree:
        entries = acc["last"]
        return windows.push(acc, summed(_of_batch(entries, value, per_example, weights), entries))

    def compute(acc: PyTree) -> PyTree:
        return _average_compute(windows.total(acc, merge_sums))

    return Reduction(init, update, windows.merge_entries, compute)


# --- sum -----------------------------------------------------------------------------------------


def _sum_init(shape: Shape, per_example: bool, float_weights: bool) -> PyTree:
    exact = _is_discrete(shape) and not (float_weights and per_example)
    total = _zero(_rest(shape, per_example), exact=exact)
    return {"sum": total, "seen": jnp.zeros((), jnp.bool_)}


def _sum_delta(acc: PyTree, value: Observed, per_example: bool, weights: BatchWeights) -> PyTree:
    seen = weights.present
    if per_example:
        assert not isinstance(value, ExactInt)
        return {"sum": Examples(value, weights.weight), "seen": seen}
    # A batch's one value is added unweighted, because it is already a value for all examples.
    value = _where(seen, value, jax.tree.map(jnp.zeros_like, value))
    if isinstance(acc["sum"], ExactInt):
        return {"sum": exact_int(value, sum_limbs()), "seen": seen}
    assert not isinstance(value, ExactInt)
    return {"sum": sum_examples(value[None], None), "seen": seen}


def _sum_compute(acc: PyTree) -> PyTree:
    total = acc["sum"]
    return _or_nan(acc["seen"], total.hi if isinstance(total, Pair) else total)


_SUM = _of_sums(_sum_init, _sum_delta, _sum_compute)


# --- minimum and maximum -------------------------------------------------------------------------


def _extremum(*, largest: bool) -> Reduction:
    over_axis = jnp.max if largest else jnp.min

    def pick(a: Observed, b: Observed) -> Observed:
        if isinstance(a, ExactInt) and isinstance(b, ExactInt):
            return where_int(less_int(a, b) if largest else less_int(b, a), b, a)
        assert not isinstance(a, ExactInt) and not isinstance(b, ExactInt)
        return jnp.maximum(a, b) if largest else jnp.minimum(a, b)

    def identity(shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        if is_integer(dtype):
            limits = jnp.iinfo(dtype)  # also of int4
            value: Any = limits.min if largest else limits.max
        else:
            value = -jnp.inf if largest else jnp.inf
        return jnp.full(shape, np.asarray(value, dtype))

    def init(shape: Shape, per_example: bool, float_weights: bool) -> PyTree:
        seen = jnp.zeros((), jnp.bool_)
        if isinstance(shape, ExactInt):
            value = extreme_int(shape.shape, len(shape.limbs), largest=not largest)
            return {"value": value, "seen": seen}
        dtype = jnp.int32 if shape.dtype == jnp.bool_ else _wide_dtype(shape.dtype)
        return {"value": identity(_rest(shape, per_example), dtype), "seen": seen}

    def update(acc: PyTree, value: Observed, per_example: bool, weights: BatchWeights) -> PyTree:
        seen, old = weights.present, acc["value"]
        if not isinstance(value, ExactInt):
            value = value.astype(old.dtype)
        if per_example:
            assert not isinstance(value, ExactInt)
            if weights.weight is not None:
                some = weights.weight.astype(jnp.bool_)
                seen = jnp.any(some)
                shaped = some.reshape(some.shape + (1,) * (value.ndim - 1))
                value = jnp.where(shaped, value, identity((), value.dtype))
            value = over_axis(value, axis=0) if weights.num_examples else old
        else:
            value = _where(seen, value, old)
        return {"value": pick(old, value), "seen": acc["seen"] | seen}

    def merge(a: PyTree, b: PyTree) -> PyTree:
        return {"value": pick(a["value"], b["value"]), "seen": a["seen"] | b["seen"]}

    return Reduction(init, update, merge, lambda acc: _or_nan(acc["seen"], acc["value"]))


# --- last ----------------------------------------------------------------------------------------


def _last_init(shape: Shape, per_example: bool, float_weights: bool) -> PyTree:
    seen = jnp.zeros((), jnp.bool_)
    if per_example and _averages_exactly(shape, float_weights):
        return {"value": _average_init(shape, per_example, float_weights), "seen": seen}
    if isinstance(shape, ExactInt):
        return {"value": zero_int(shape.shape, num_limbs=len(shape.limbs)), "seen": seen}
    dtype = float_dtype() if per_example else _wide_dtype(shape.dtype)
    return {"value": jnp.zeros(_rest(shape, per_example), dtype), "seen": seen}


def _last_update(acc: PyTree, value: Observed, per_example: bool, weights: BatchWeights) -> PyTree:
    old, new = acc["value"], value
    if per_example:
        entry = old if isinstance(old, dict) else {"sum": zero_pair(), "weight": zero_pair()}
        new = summed(_of_batch(entry, value, per_example, weights), entry)
        new = new if isinstance(old, dict) else divide_pairs(new["sum"], new["weight"], jnp.nan)
    elif not isinstance(value, ExactInt):
        new = value.astype(old.dtype)
    return {"value": _where(weights.present, new, old), "seen": acc["seen"] | weights.present}


def _last_merge(a: PyTree, b: PyTree) -> PyTree:
    return {"value": _where(b["seen"], b["value"], a["value"]), "seen": a["seen"] | b["seen"]}


def _last_compute(acc: PyTree) -> PyTree:
    value = acc["value"]
    return _average_compute(value) if isinstance(value, dict) else _or_nan(acc["seen"], value)


_LAST = Reduction(_last_init, _last_update, _last_merge, _last_compute)


# --- a function of the user's --------------------------------------------------------------------


def _custom(fn: AccumulateFn) -> Reduction:
    def init(shape: Shape, per_example: bool, float_weights: bool) -> PyTree:
        dtype = jnp.dtype(jnp.int32) if isinstance(shape, ExactInt) else _wide_dtype(shape.dtype)
        return {"value": jnp.zeros(shape.shape, dtype), "iteration": jnp.zeros((), jnp.int32)}

    def update(acc: PyTree, value: Observed, per_example: bool, weights: BatchWeights) -> PyTree:
        old = acc["value"]
        if isinstance(value, ExactInt):
            # A user's function cannot take limbs. The count of one batch fits into 32 bits.
            value = value.limbs[0]
        value = value.astype(old.dtype)
        if value.shape != old.shape:
            raise errors.ShapeError(
                f"the observation for an accumulate function must have shape {old.shape} in every "
                f"batch, got {value.shape}",
                fix="observe a value whose shape does not depend on the size of the batch",
            )
        new = jnp.asarray(fn(old, value, acc["iteration"]))
        if new.shape != old.shape or (_is_discrete(old) and not _is_discrete(new)):
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
