"""Sums that do not lose small numbers: pairs of float32 with about twice the precision of one.

    total = zero_pair()
    total = add_pairs(total, sum_examples(values, weight))
    mean = divide_pairs(total, sum_weights(weight, len(values)), empty=jnp.nan)

Invariant: a pair counts exactly up to 2**48, and the order in which the batches arrive changes a
sum by rounding only.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxloop._core.types import PyTree


class Pair(NamedTuple):
    """The unevaluated sum ``hi + lo`` of two float32 numbers, where ``hi`` is the rounded sum.

    A pair holds every integer below 2**48 exactly, while a float32 stops counting at 2**24. If the
    sum is infinite or NaN, ``hi`` alone holds it.
    """

    hi: jax.Array
    lo: jax.Array


def zero_pair(shape: tuple[int, ...] = ()) -> Pair:
    """Returns the empty sum."""
    return Pair(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def add_pairs(a: Pair, b: Pair) -> Pair:
    """Returns ``a + b`` with an error of about 2**-46 of the larger one.

    The result is exact if a pair can hold it.

    Source: AccurateDWPlusDW of Joldes, Muller, Popescu, "Tight and rigorous error bounds for basic
    building blocks of double-word arithmetic", 2017.
    """
    sum_hi, err_hi = _two_sum(a.hi, b.hi)
    sum_lo, err_lo = _two_sum(a.lo, b.lo)
    hi, lo = _fast_two_sum(sum_hi, err_hi + sum_lo)
    hi, lo = _fast_two_sum(hi, lo + err_lo)
    # The error terms of an infinite or NaN sum are NaN, so the plain sum is the right answer there.
    finite = jnp.isfinite(sum_hi)
    return Pair(jnp.where(finite, hi, sum_hi), jnp.where(finite, lo, 0))


def merge_pairs(a: PyTree, b: PyTree) -> PyTree:
    """Adds two trees of pairs, pair by pair."""
    return jax.tree.map(add_pairs, a, b, is_leaf=lambda x: isinstance(x, Pair))


def divide_pairs(numerator: Pair, denominator: Pair, empty: float) -> jax.Array:
    """Returns ``numerator / denominator`` as float32, or ``empty`` where the denominator is 0."""
    some = denominator.hi != 0
    return jnp.where(some, numerator.hi / jnp.where(some, denominator.hi, 1), empty)


def pair_of_int(value: jax.Array | int) -> Pair:
    """Returns an int32 as an exact pair."""
    number = jnp.asarray(value, jnp.int32)
    # The 12 low bits and the rest each fit into the 24 bits of a float32. The whole may not.
    low = number & 0xFFF
    return Pair(*_fast_two_sum((number - low).astype(jnp.float32), low.astype(jnp.float32)))


def sum_examples(values: jax.Array, weight: jax.Array | None) -> Pair:
    """Returns the weighted sum over the first axis.

    Args:
        values: ``(batch, *rest)``, any real dtype.
        weight: ``(batch,)`` or None.

    Returns:
        A pair of shape ``rest``.
    """
    if weight is not None:
        shaped = weight.reshape(weight.shape + (1,) * (values.ndim - 1))
        # `where` and not a product, because 0 * NaN is NaN.
        values = jnp.where(shaped.astype(jnp.bool_), values, jnp.zeros((), values.dtype))
        if weight.dtype != jnp.bool_:
            values = _times(values, shaped)
    if values.dtype == jnp.bool_ or (
        jnp.issubdtype(values.dtype, jnp.integer) and values.dtype.itemsize <= 1
    ):
        # The int32 sum of one-byte integers is exact for up to 2**23 examples.
        return pair_of_int(jnp.sum(values, axis=0, dtype=jnp.int32))
    high, low = _split(values)
    total = _sum_floats(high)
    return total if low is None else add_pairs(total, _sum_floats(low))


def sum_weights(weight: jax.Array | None, num_examples: int) -> Pair:
    """Returns the sum of the weights, or the number of examples if ``weight`` is None."""
    if weight is None:
        return pair_of_int(num_examples)
    return sum_examples(weight, None)


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Knuth's version. It has no multiplication that XLA could contract with an addition.
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _fast_two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Dekker's version. It needs |a| >= |b| or a == 0.
    total = a + b
    return total, b - (total - a)


def _times(values: jax.Array, weight: jax.Array) -> jax.Array:
    # The dtype is chosen here, because under strict promotion `promote_types` refuses to mix.
    wide = jnp.dtype(jnp.float32)
    if values.dtype == jnp.float64 or weight.dtype == jnp.float64:
        wide = jnp.dtype(jnp.float64)
    is_int = [
        jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_ for x in (values, weight)
    ]
    dtype = jnp.dtype(jnp.int32) if all(is_int) else wide
    return values.astype(dtype) * weight.astype(dtype)


def _split(values: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Returns values as float32, or as a sum of two float32 where one cannot hold them."""
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
    """Returns the sum of float32 values over the first axis, with about twice their precision.

    Every value is cut at the same power of two. The cut is so high that the sum of the upper parts
    is exact in any order of summation, and only the small lower parts round.

    Source: ExtractVector of Rump, Ogita, Oishi, "Accurate floating-point summation I", 2008.
    """
    num = values.shape[0]
    if num == 0:
        return zero_pair(values.shape[1:])
    if num == 1:
        return Pair(values[0], jnp.zeros_like(values[0]))
    largest = jnp.max(jnp.abs(values), axis=0, keepdims=True)
    # 2**(exponent + 1) > largest. The sum of num values needs one more bit, and one is spare.
    exponent = lax.bitcast_convert_type(largest, jnp.int32) >> 23
    exponent = exponent + 2 + (num - 1).bit_length()
    # If the cut is too large for float32 (huge, infinite or NaN values), the sum is a plain one.
    fits = exponent < 255
    cut = lax.bitcast_convert_type(jnp.where(fits, exponent, 0) << 23, jnp.float32)
    upper = (values + cut) - cut
    lower = jnp.where(fits, values - upper, 0)
    return add_pairs(
        Pair(jnp.sum(upper, axis=0), jnp.zeros_like(cut[0])),
        Pair(jnp.sum(lower, axis=0), jnp.zeros_like(cut[0])),
    )
