"""The algebra of metrics: accumulators, exact sums, and the mean and ratios made of them.

    metric = mean(lambda y_true, y_pred: (y_true - y_pred) ** 2)
    acc = metric.update(metric.init(), y_true, y_pred, weight=mask)
    value = metric.compute(metric.merge(acc, other_acc))

Invariant: ``merge(init(), a) == a``, merge is associative, and any split of the data gives the same
value: counts exactly, sums to rounding. An accumulator's structure, shapes and dtypes never depend
on the batch. Examples of weight 0 add nothing, whatever their value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxloop import errors

Accumulator = Any


@dataclass(frozen=True)
class Metric:
    """An accumulator: four pure functions over a pytree.

    Attributes:
        init: ``() -> acc``.
        update: ``(acc, *values, weight=None) -> acc``, with ``weight`` of shape ``(batch,)``.
        merge: ``(acc, acc) -> acc``.
        compute: ``acc -> value``, a pytree.
        name: What it is called where no other name is given.
        weighted: The form to use under float weights, where that is another one (counts are int32
            without weights and float32 with them).
    """

    init: Callable[[], Accumulator]
    update: Callable[..., Accumulator]
    merge: Callable[[Accumulator, Accumulator], Accumulator]
    compute: Callable[[Accumulator], Any]
    name: str = ""
    weighted: Metric | None = None


# --- sums that do not forget ---------------------------------------------------------------------


class Pair(NamedTuple):
    """The unevaluated sum ``hi + lo`` of two float32, ``hi`` being the sum rounded.

    It holds every integer below 2**48 exactly, where a float32 stops counting at 2**24. A sum that
    is not finite is in ``hi`` alone.
    """

    hi: jax.Array
    lo: jax.Array


def zero_pair(shape: tuple[int, ...] = ()) -> Pair:
    """The empty sum."""
    return Pair(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def add_pairs(a: Pair, b: Pair) -> Pair:
    """``a + b``, with an error of about 2**-46 of the larger; exact where a pair can hold it.

    Source: AccurateDWPlusDW of Joldes, Muller, Popescu, "Tight and rigorous error bounds for basic
    building blocks of double-word arithmetic", 2017.
    """
    sum_hi, err_hi = _two_sum(a.hi, b.hi)
    sum_lo, err_lo = _two_sum(a.lo, b.lo)
    hi, lo = _fast_two_sum(sum_hi, err_hi + sum_lo)
    hi, lo = _fast_two_sum(hi, lo + err_lo)
    # The errors of an infinite or NaN sum are NaN: the plain sum is the honest answer there.
    finite = jnp.isfinite(sum_hi)
    return Pair(jnp.where(finite, hi, sum_hi), jnp.where(finite, lo, 0))


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Knuth: no multiplication, so no contraction of XLA can change it.
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _fast_two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Dekker: needs |a| >= |b| or a == 0.
    total = a + b
    return total, b - (total - a)


def pair_of_int(value: jax.Array | int) -> Pair:
    """An int32 as an exact pair."""
    number = jnp.asarray(value, jnp.int32)
    # 12 low bits and the rest: each fits the 24 bits of a float32, where the whole might not.
    low = number & 0xFFF
    return Pair(*_fast_two_sum((number - low).astype(jnp.float32), low.astype(jnp.float32)))


def sum_examples(values: jax.Array, weight: jax.Array | None) -> Pair:
    """The weighted sum over the first axis.

    Args:
        values: ``(batch, *rest)``, any real dtype.
        weight: ``(batch,)`` or None.

    Returns:
        A pair of shape ``rest``.
    """
    if weight is not None:
        shaped = weight.reshape(weight.shape + (1,) * (values.ndim - 1))
        # Selected, not multiplied: 0 * NaN is NaN.
        values = jnp.where(shaped.astype(jnp.bool_), values, jnp.zeros((), values.dtype))
        if weight.dtype != jnp.bool_:
            values = _times(values, shaped)
    if values.dtype == jnp.bool_ or (
        jnp.issubdtype(values.dtype, jnp.integer) and values.dtype.itemsize <= 1
    ):
        # Small integers: summed as int32, exact up to 2**23 examples of one byte.
        return pair_of_int(jnp.sum(values, axis=0, dtype=jnp.int32))
    high, low = _split(values)
    total = _sum_floats(high)
    return total if low is None else add_pairs(total, _sum_floats(low))


def sum_weights(weight: jax.Array | None, num_examples: int) -> Pair:
    """The sum of the weights, or the number of examples where there are none."""
    if weight is None:
        return pair_of_int(num_examples)
    return sum_examples(weight, None)


def _times(values: jax.Array, weight: jax.Array) -> jax.Array:
    # Chosen by hand: under strict promotion even `promote_types` refuses to mix.
    wide = jnp.dtype(jnp.float32)
    if values.dtype == jnp.float64 or weight.dtype == jnp.float64:
        wide = jnp.dtype(jnp.float64)
    is_int = [
        jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_ for x in (values, weight)
    ]
    dtype = jnp.dtype(jnp.int32) if all(is_int) else wide
    return values.astype(dtype) * weight.astype(dtype)


def _split(values: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Values as a sum of float32, of two where one cannot hold them."""
    dtype = values.dtype
    if jnp.issubdtype(dtype, jnp.integer):
        if dtype.itemsize <= 2:
            return values.astype(jnp.float32), None
        low = values & jnp.asarray(0xFFF, dtype)
        return (values - low).astype(jnp.float32), low.astype(jnp.float32)
    if dtype.itemsize <= 4:
        return values.astype(jnp.float32), None
    high = values.astype(jnp.float32)
    rest = jnp.where(jnp.isfinite(high), values - high.astype(dtype), 0)
    return high, rest.astype(jnp.float32)


def _sum_floats(values: jax.Array) -> Pair:
    """The sum of float32 over the first axis, to about twice their precision.

    Every value is cut at one power of two, the same for all, so high that the sum of the upper
    parts is exact in any order of summation; only the small lower parts round.

    Source: ExtractVector of Rump, Ogita, Oishi, "Accurate floating-point summation I", 2008.
    """
    num = values.shape[0]
    if num == 0:
        return zero_pair(values.shape[1:])
    if num == 1:
        return Pair(values[0], jnp.zeros_like(values[0]))
    largest = jnp.max(jnp.abs(values), axis=0, keepdims=True)
    # 2**(exponent + 1) > largest; one bit for the sum of num values and one to spare.
    exponent = lax.bitcast_convert_type(largest, jnp.int32) >> 23
    exponent = exponent + 2 + (num - 1).bit_length()
    # Where the cut is beyond float32 (huge, infinite or NaN values) nothing is cut: a plain sum.
    fits = exponent < 255
    cut = lax.bitcast_convert_type(jnp.where(fits, exponent, 0) << 23, jnp.float32)
    upper = (values + cut) - cut
    lower = jnp.where(fits, values - upper, 0)
    return add_pairs(
        Pair(jnp.sum(upper, axis=0), jnp.zeros_like(cut[0])),
        Pair(jnp.sum(lower, axis=0), jnp.zeros_like(cut[0])),
    )


# --- weights -------------------------------------------------------------------------------------


def check_weight(weight: Any, num_examples: int, where: str) -> jax.Array | None:
    """The weights as an array, or None.

    Raises:
        ShapeError: They are not one number per example.
    """
    if weight is None:
        return None
    array = jnp.asarray(weight)
    if array.shape != (num_examples,):
        raise errors.ShapeError(
            f"{where}: weight (sample_weight or mask) has shape {array.shape}, expected "
            f"({num_examples},)",
            fix="give one weight per example",
        )
    return array


def is_float_weight(weight: Any) -> bool:
    """Whether weights are given and float, so that they may be fractions."""
    return weight is not None and bool(jnp.issubdtype(jnp.result_type(weight), jnp.floating))


# --- the mean ------------------------------------------------------------------------------------


def mean(values_fn: Callable[..., Any], *, name: str = "") -> Metric:
    """The weighted mean over the examples of what a function returns for each.

    Args:
        values_fn: ``(*values) -> (batch,)`` or ``(batch, *rest)``; the mean runs over all axes.
            A scalar stands for its whole batch, and is an error together with weights.
        name: The name of the metric.

    Returns:
        A metric whose value is a float32 scalar, NaN before the first update.

    Example:
        >>> import jax.numpy as jnp
        >>> m = mean(lambda x: x)
        >>> float(m.compute(m.update(m.init(), jnp.array([1.0, 3.0]))))
        2.0
    """

    def init() -> dict[str, Pair]:
        return {"sum": zero_pair(), "weight": zero_pair()}

    def update(acc: dict[str, Pair], *values: Any, weight: Any = None) -> dict[str, Pair]:
        result = jnp.asarray(values_fn(*values))
        if result.ndim == 0:
            num = leading_axis(values) or 1
            if weight is not None:
                raise scalar_with_weights(name or "mean")
            result, weight = result[None], jnp.full((1,), num, jnp.int32)
        else:
            weight = check_weight(weight, result.shape[0], name or "mean")
        if result.ndim > 1:
            result = jnp.mean(
                result.astype(jnp.float64 if result.dtype == jnp.float64 else jnp.float32),
                axis=tuple(range(1, result.ndim)),
            )
        return {
            "sum": add_pairs(acc["sum"], sum_examples(result, weight)),
            "weight": add_pairs(acc["weight"], sum_weights(weight, result.shape[0])),
        }

    def compute(acc: dict[str, Pair]) -> jax.Array:
        return divide_pairs(acc["sum"], acc["weight"], jnp.nan)

    return Metric(init, update, merge_pairs, compute, name)


def divide_pairs(numerator: Pair, denominator: Pair, empty: float) -> jax.Array:
    """``numerator / denominator`` as float32, ``empty`` where the denominator is 0."""
    some = denominator.hi != 0
    return jnp.where(some, numerator.hi / jnp.where(some, denominator.hi, 1), empty)


def merge_pairs(a: Any, b: Any) -> Any:
    """The sum of two trees of pairs."""
    return jax.tree.map(add_pairs, a, b, is_leaf=lambda x: isinstance(x, Pair))


def leading_axis(values: Any) -> int | None:
    """The length of the first axis of the first array that has one."""
    for leaf in jax.tree.leaves(values):
        shape = getattr(leaf, "shape", ())
        if shape:
            return int(shape[0])
    return None


def scalar_with_weights(name: str) -> errors.ShapeError:
    """The error for a scalar that cannot honour weights."""
    return errors.ShapeError(
        f"metric {name!r}: a scalar came together with sample weights (or a mask), so its average "
        "cannot be exact",
        fix="return one value per example",
    )
