"""Sums that do not lose small numbers: pairs of floats with about twice the precision of one.

    total = zero_pair()
    total = add_pairs(total, sum_examples(values, weight))
    mean = divide_pairs(total, sum_weights(weight, len(values)), empty=jnp.nan)

The floats are float32, or float64 if x64 is enabled. Invariant: a pair counts exactly up to 2**48
(2**106 with float64), and the order in which the batches arrive changes a sum by rounding only.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxloop._core.types import PyTree
from jaxloop.metrics.exact_int import (
    ExactInt,
    is_integer,
    is_x64,
    negate_int,
    sum_ints,
    sum_limbs,
    where_int,
)

_SHORT_SUM = 32
"""The number of values that are summed one after the other."""


class Pair(NamedTuple):
    """The unevaluated sum ``hi + lo`` of two floats, where ``hi`` is the rounded sum.

    A pair of float32 holds every integer below 2**48 exactly, while a float32 stops counting at
    2**24. If the sum is infinite or NaN, ``hi`` alone holds it.
    """

    hi: jax.Array
    lo: jax.Array


def float_dtype() -> jnp.dtype:
    """Returns JAX's default float dtype: float32, or float64 if x64 is enabled."""
    return jnp.dtype(jnp.float64 if is_x64() else jnp.float32)


def zero_pair(shape: tuple[int, ...] = ()) -> Pair:
    """Returns the empty sum."""
    return Pair(jnp.zeros(shape, float_dtype()), jnp.zeros(shape, float_dtype()))


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
    """Returns ``numerator / denominator`` as a float, or ``empty`` where the denominator is 0."""
    some = denominator.hi != 0
    return jnp.where(some, numerator.hi / jnp.where(some, denominator.hi, 1), empty)


def pair_of_int(value: jax.Array | int) -> Pair:
    """Returns an int32 as an exact pair."""
    number = jnp.asarray(value, jnp.int32)
    # The 12 low bits and the rest each fit into the 24 bits of a float32. The whole may not.
    low = number & 0xFFF
    dtype = float_dtype()
    return Pair(*_fast_two_sum((number - low).astype(dtype), low.astype(dtype)))


def pair_of_exact(value: ExactInt) -> Pair:
    """Returns integers as a pair, which is exact for those that a pair can hold."""
    dtype = float_dtype()
    negative = value.limbs[-1] >> 31 == 1
    magnitude = where_int(negative, negate_int(value), value)
    hi = lo = jnp.zeros(value.shape, dtype)
    # From the top down, so that `hi` is 0 or larger than the next digit.
    for index in range(len(value.limbs) - 1, -1, -1):
        limb = magnitude.limbs[index]
        for shift, digit in ((16, limb >> 16), (0, limb & 0xFFFF)):
            scale = jnp.asarray(2.0 ** (32 * index + shift), dtype)
            hi, rest = _fast_two_sum(hi, digit.astype(dtype) * scale)
            lo += rest
    hi, lo = _fast_two_sum(hi, lo)
    return Pair(jnp.where(negative, -hi, hi), jnp.where(negative, -lo, lo))


def sum_examples(values: jax.Array, weight: jax.Array | None) -> Pair:
    """Returns the weighted sum over the first axis.

    Args:
        values: ``(batch, *rest)``, any real dtype.
        weight: ``(batch,)`` or None.

    Returns:
        A pair of shape ``rest``.
    """
    is_int = values.dtype == jnp.bool_ or is_integer(values.dtype)
    if weight is not None:
        if is_int and is_integer(weight.dtype):
            return pair_of_exact(sum_ints(values, weight, sum_limbs()))
        shaped = weight.reshape(weight.shape + (1,) * (values.ndim - 1))
        # `where` and not a product, because 0 * NaN is NaN.
        values = jnp.where(shaped.astype(jnp.bool_), values, jnp.zeros((), values.dtype))
        if weight.dtype != jnp.bool_:
            values = values.astype(float_dtype()) * shaped.astype(float_dtype())
            is_int = False
    if is_int and values.dtype.itemsize <= 1:
        # The int32 sum of one-byte integers is exact for up to 2**23 examples.
        return pair_of_int(jnp.sum(values, axis=0, dtype=jnp.int32))
    if is_int:
        return pair_of_exact(sum_ints(values, None, sum_limbs()))
    return _sum_floats(values.astype(float_dtype()))


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


def _sum_floats(values: jax.Array) -> Pair:
    """Returns the sum of floats over the first axis, with about twice their precision."""
    num = values.shape[0]
    if num == 0:
        return zero_pair(values.shape[1:])
    if num == 1:
        return Pair(values[0], jnp.zeros_like(values[0]))
    upper, lower = _cut(values)
    zero = jnp.zeros((), values.dtype)
    # One reduction for both. In two, XLA may compute `upper` twice, once with `values` contracted
    # into a fused multiply-add and once without. The two then differ by a unit of `upper`.
    totals = (upper, lower)
    while totals[0].shape[0] > _SHORT_SUM:
        totals = lax.reduce(tuple(map(_in_groups, totals)), (zero, zero), _add_both, (0,))
    totals = lax.reduce(totals, (zero, zero), _add_both, (0,))
    return add_pairs(*(Pair(total, jnp.zeros_like(total)) for total in totals))


def _cut(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cuts each value in two at the same power of two.

    The cut is so high that the sum of the upper parts over the first axis is exact in any order of
    summation, and only the small lower parts round.

    Source: ExtractVector of Rump, Ogita, Oishi, "Accurate floating-point summation I", 2008.
    """
    largest = jnp.max(jnp.abs(values), axis=0, keepdims=True)
    wide = values.dtype == jnp.float64
    bits, mantissa, limit = (jnp.int64, 52, 2047) if wide else (jnp.int32, 23, 255)
    # 2**(exponent + 1) > largest. The sum of num values needs one more bit, and one is spare.
    exponent = lax.bitcast_convert_type(largest, bits) >> mantissa
    exponent = exponent + 2 + (values.shape[0] - 1).bit_length()
    # If the cut is too large for the dtype (huge, infinite or NaN values), the sum is a plain one.
    fits = exponent < limit
    cut = lax.bitcast_convert_type(jnp.where(fits, exponent, 0) << mantissa, values.dtype)
    upper = (values + cut) - cut
    return upper, jnp.where(fits, values - upper, 0)


def scatter_floats(index: jax.Array, weight: jax.Array, num_bins: int) -> Pair:
    """Returns the sum of the weights of the elements in each bin.

    Args:
        index: ``(elements,)`` of int32. Elements of an index of at least ``num_bins`` do not count.
        weight: ``(elements,)`` of floats.
        num_bins: The number of bins.

    Returns:
        A pair of shape ``(num_bins,)``.
    """
    weight = weight.astype(float_dtype())
    if not len(index):
        return zero_pair((num_bins,))
    both = jnp.stack(_cut(weight), axis=-1)
    sums = jnp.zeros((num_bins, 2), weight.dtype).at[index].add(both, mode="drop")
    upper, lower = sums[:, 0], sums[:, 1]
    return add_pairs(Pair(upper, jnp.zeros_like(upper)), Pair(lower, jnp.zeros_like(lower)))


def _in_groups(values: jax.Array) -> jax.Array:
    """Splits the first axis in two, because short sums of rounded numbers round less.

    Returns:
        Values of shape ``(_SHORT_SUM, num_groups, *rest)``, with zeros at the end.
    """
    missing = -values.shape[0] % _SHORT_SUM
    if missing:
        values = jnp.concatenate([values, jnp.zeros((missing, *values.shape[1:]), values.dtype)])
    return values.reshape(_SHORT_SUM, -1, *values.shape[1:])


def _add_both(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return a[0] + b[0], a[1] + b[1]
