"""Exact integers: 32-bit limbs on the device, and 64-bit integers on the host.

    total = zero_int(num_limbs=sum_limbs())
    total = add_ints(total, sum_ints(values, weight, sum_limbs()))
    total.to_numpy()                                  # np.int64, on the host

Without x64, JAX has no integer of more than 32 bits, and float32 stops counting at 2**24.
Invariant: a sum has so many limbs that it cannot wrap, whatever the dtypes of values and weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxloop._core.types import PyTree

HostArray: TypeAlias = np.ndarray[Any, Any]

_EXACT_IN_FLOAT64 = 2**53
_MOST_ADDENDS = 2**15
"""So many numbers of 16 bits have a sum of fewer than 32 bits."""


class _HostValue(np.lib.mixins.NDArrayOperatorsMixin):
    """A value that only the host can hold. Outside jit, it works like its NumPy array."""

    def to_numpy(self) -> HostArray:
        """Returns the value as a NumPy array or scalar."""
        raise NotImplementedError

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> HostArray:
        """Returns the value for NumPy."""
        return np.asarray(self.to_numpy(), dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Applies NumPy's functions and Python's operators to the value."""
        values = (x.to_numpy() if isinstance(x, _HostValue) else x for x in inputs)
        return getattr(ufunc, method)(*values, **kwargs)

    def __int__(self) -> int:
        """Returns a scalar as an int."""
        return int(self.to_numpy())

    def __float__(self) -> float:
        """Returns a scalar as a float."""
        return float(self.to_numpy())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_shown(self)})"


def _shown(value: _HostValue) -> str:
    try:
        return str(value.to_numpy())
    except Exception:  # inside jit, or with shapes in place of arrays, there is no value
        return "..."


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ExactInt(_HostValue):
    """An array of integers in two's complement.

    Outside jit, it converts to a Python or NumPy integer: ``int(value)``, ``np.asarray(value)``.

    Attributes:
        limbs: uint32 arrays of one shape, the lowest 32 bits first.
    """

    limbs: tuple[jax.Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.limbs[0].shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of its NumPy array, unless a number does not fit."""
        return np.dtype(np.int64)

    def to_numpy(self) -> HostArray:
        """Returns int64, or if a number does not fit, uint64, or if none does, rounded float64."""
        small = self.small()
        if small is not None:
            return small
        numbers = self.python_ints()
        if all(0 <= number < 2**64 for number in numbers.flat):
            return numbers.astype(np.uint64)[()]
        return numbers.astype(np.float64)[()]

    def small(self) -> HostArray | None:
        """Returns the numbers as int64, or None if one does not fit."""
        limbs = [np.asarray(limb, np.uint64) for limb in self.limbs]
        value = (limbs[0] | limbs[1] << np.uint64(32)).astype(np.int64)
        if len(limbs) == 2:
            return value
        sign = np.where(value < 0, np.uint64(2**32 - 1), np.uint64(0))
        return value if all(np.array_equal(limb, sign) for limb in limbs[2:]) else None

    def python_ints(self) -> HostArray:
        """Returns the numbers as an object array of Python ints."""
        numbers = np.empty(self.shape, object)
        size = 2 ** (32 * len(self.limbs))
        limbs = [np.asarray(limb).ravel().tolist() for limb in self.limbs]
        for i, parts in enumerate(zip(*limbs, strict=True)):
            number = sum(part << (32 * k) for k, part in enumerate(parts))
            numbers.flat[i] = number - size if number >= size // 2 else number
        return numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ExactRatio(_HostValue):
    """The quotient of integers: a float64 that is rounded once, or NaN if the denominator is 0.

    Outside jit, it converts to a Python or NumPy float: ``float(value)``, ``np.asarray(value)``.

    Attributes:
        numerator: ``(*some, *rest)``.
        denominator: ``some``.
    """

    numerator: ExactInt
    denominator: ExactInt

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.numerator.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of its NumPy array."""
        return np.dtype(np.float64)

    def to_numpy(self) -> HostArray:
        """Returns float64."""
        above, below = self.numerator.small(), self.denominator.small()
        if above is None or below is None or _is_large(above) or _is_large(below):
            above, below = self.numerator.python_ints(), self.denominator.python_ints()
        below = np.broadcast_to(
            below.reshape(below.shape + (1,) * (above.ndim - below.ndim)), above.shape
        )
        if above.dtype != object:
            return np.where(below == 0, np.nan, above / np.where(below == 0, 1, below))[()]
        quotient = np.empty(above.shape)
        for i, (part, whole) in enumerate(zip(above.flat, below.flat, strict=True)):
            quotient.flat[i] = part / whole if whole else np.nan
        return quotient[()]


def _is_large(value: HostArray) -> bool:
    # Float64 holds smaller integers exactly, so that their quotient is rounded once.
    return bool(np.any((value > _EXACT_IN_FLOAT64) | (value < -_EXACT_IN_FLOAT64)))


def is_exact(value: object) -> bool:
    """Returns whether a value is an `ExactInt` or an `ExactRatio`, which are leaves of a value."""
    return isinstance(value, _HostValue)


def host_rows(tree: PyTree) -> PyTree:
    """Converts the exact values in a tree of rows to NumPy arrays.

    Args:
        tree: A tree on the host, whose arrays have a leading axis of rows.

    Returns:
        The tree with NumPy arrays. The value of a row does not depend on the other rows.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, ExactInt):
            small = value.small()
            return _row_by_row(value) if small is None else small
        return value.to_numpy() if isinstance(value, _HostValue) else value

    return jax.tree.map(convert, tree, is_leaf=is_exact)


def _row_by_row(value: ExactInt) -> HostArray:
    rows = np.empty(value.shape[0], object)  # of several dtypes
    for i in range(len(rows)):
        rows[i] = ExactInt(tuple(limb[i] for limb in value.limbs)).to_numpy()
    return rows


# --- on the device -------------------------------------------------------------------------------


def is_x64() -> bool:
    """Returns whether JAX has integers and floats of 64 bits."""
    return bool(jnp.result_type(int) == jnp.int64)


def count_limbs() -> int:
    """Returns the number of limbs for sums of 2**31 weights."""
    return 3 if is_x64() else 2


def sum_limbs() -> int:
    """Returns the number of limbs for sums of 2**31 products of a number and a weight."""
    return 5 if is_x64() else 3


def is_integer(dtype: DTypeLike) -> bool:
    """Returns whether a dtype is an integer, signed or unsigned, and not bool."""
    return bool(jnp.issubdtype(dtype, jnp.integer))


def zero_int(shape: tuple[int, ...] = (), *, num_limbs: int) -> ExactInt:
    """Returns zeros."""
    return ExactInt(tuple(jnp.zeros(shape, jnp.uint32) for _ in range(num_limbs)))


def extreme_int(shape: tuple[int, ...], num_limbs: int, *, largest: bool) -> ExactInt:
    """Returns the largest or the smallest numbers of so many limbs."""
    top, rest = (2**31 - 1, 2**32 - 1) if largest else (2**31, 0)
    limbs = [rest] * (num_limbs - 1) + [top]
    return ExactInt(tuple(jnp.full(shape, limb, jnp.uint32) for limb in limbs))


def exact_int(value: jax.Array | ExactInt, num_limbs: int) -> ExactInt:
    """Converts bools or integers of any dtype, and changes the number of limbs."""
    if isinstance(value, ExactInt):
        limbs = list(value.limbs)
    elif value.dtype.itemsize == 8:
        limbs = [value.astype(jnp.uint32), (value >> 32).astype(jnp.uint32)]
    elif value.dtype == jnp.bool_ or jnp.issubdtype(value.dtype, jnp.unsignedinteger):
        limbs = [value.astype(jnp.uint32)]
    else:
        limbs = [value.astype(jnp.int32).astype(jnp.uint32)]
    signed = isinstance(value, ExactInt) or jnp.issubdtype(value.dtype, jnp.signedinteger)
    sign = _sign(limbs[-1]) if signed else jnp.zeros_like(limbs[-1])
    return ExactInt(tuple((limbs + [sign] * num_limbs)[:num_limbs]))


def add_ints(a: ExactInt, b: ExactInt) -> ExactInt:
    """Returns ``a + b``. Both have the same number of limbs."""
    limbs = []
    carry = jnp.zeros_like(a.limbs[0])
    for x, y in zip(a.limbs, b.limbs, strict=True):
        part = x + y
        total = part + carry
        carry = ((part < x) | (total < part)).astype(jnp.uint32)
        limbs.append(total)
    return ExactInt(tuple(limbs))


def multiply_ints(a: ExactInt, b: ExactInt) -> ExactInt:
    """Returns ``a * b``. Both have the same shape and the same number of limbs."""
    x, y = _halves(a), _halves(b)
    columns = [jnp.zeros_like(a.limbs[0]) for _ in range(len(x) + 1)]
    for i, left in enumerate(x):
        for j, right in enumerate(y[: len(x) - i]):
            product = left * right
            columns[i + j] += product & 0xFFFF
            columns[i + j + 1] += product >> 16
    return _carried(columns[:-1])


def less_int(a: ExactInt, b: ExactInt) -> jax.Array:
    """Returns ``a < b``. Both have the same number of limbs."""
    result = jnp.zeros(a.shape, jnp.bool_)
    for index, (x, y) in enumerate(zip(a.limbs, b.limbs, strict=True)):
        if index == len(a.limbs) - 1:  # the sign bit orders the other way round
            x, y = x ^ jnp.uint32(2**31), y ^ jnp.uint32(2**31)
        result = (x < y) | ((x == y) & result)
    return result


def where_int(condition: jax.Array, a: ExactInt, b: ExactInt) -> ExactInt:
    """Returns ``a`` where the condition holds, else ``b``. The condition may be a scalar."""
    return ExactInt(
        tuple(jnp.where(condition, x, y) for x, y in zip(a.limbs, b.limbs, strict=True))
    )


def sum_ints(values: jax.Array, weight: jax.Array | None, num_limbs: int) -> ExactInt:
    """Returns the weighted sum over the first axis, exactly.

    Args:
        values: ``(batch, *rest)`` of bool or integers.
        weight: ``(batch,)`` of bool or integers, or None.
        num_limbs: The number of limbs of the result.
    """
    if weight is not None:
        shaped = weight.reshape(weight.shape + (1,) * (values.ndim - 1))
        if weight.dtype == jnp.bool_:
            values = jnp.where(shaped, values, jnp.zeros((), values.dtype))
        elif values.dtype == jnp.bool_:
            values = jnp.where(values, shaped, jnp.zeros((), weight.dtype))
        else:
            shaped = jnp.broadcast_to(shaped, values.shape)
            return _sum_limbs(exact_int(_product(values, shaped), num_limbs))
    num_bits = 1 if values.dtype == jnp.bool_ else 8 * values.dtype.itemsize
    if values.shape[0].bit_length() + num_bits < 32:
        return exact_int(jnp.sum(values, axis=0, dtype=jnp.int32), num_limbs)
    return _sum_limbs(exact_int(values, num_limbs))


def scatter_ints(
    index: jax.Array, weight: jax.Array | None, num_bins: int, num_limbs: int
) -> ExactInt:
    """Returns the weighted number of elements in each bin, exactly.

    Args:
        index: ``(elements,)`` of int32. Elements of an index of at least ``num_bins`` do not count.
        weight: ``(elements,)`` of bool or integers, or None.
        num_bins: The number of bins.
        num_limbs: The number of limbs of the result.

    Returns:
        Integers of shape ``(num_bins,)``.
    """
    if weight is None or weight.dtype == jnp.bool_:
        ones = jnp.ones(index.shape, jnp.int32) if weight is None else weight.astype(jnp.int32)
        counts = jnp.zeros(num_bins, jnp.int32).at[index].add(ones, mode="drop")
        return exact_int(counts, num_limbs)
    # The sums of 16-bit halves are exact for so many elements, and then for so many pieces.
    halves = jnp.stack(_halves(exact_int(weight, num_limbs)), axis=-1)
    num_pieces = -(-len(index) // _MOST_ADDENDS) or 1
    piece = jnp.arange(len(index), dtype=jnp.int32) // _MOST_ADDENDS
    sums = jnp.zeros((num_pieces, num_bins, halves.shape[-1]), jnp.uint32)
    sums = sums.at[piece, index].add(halves, mode="drop")
    return _sum_limbs(_carried(list(jnp.moveaxis(sums, -1, 0))))


def _product(a: jax.Array, b: jax.Array) -> ExactInt:
    """Returns ``a * b`` for integers of any dtypes, with just enough limbs and a sign."""
    num_limbs = sum(max(1, x.dtype.itemsize // 4) for x in (a, b))
    # The product of unsigned numbers needs one more limb for its sign, which is 0.
    unsigned = all(jnp.issubdtype(x.dtype, jnp.unsignedinteger) for x in (a, b))
    product = multiply_ints(exact_int(a, num_limbs), exact_int(b, num_limbs))
    sign = (jnp.zeros_like(product.limbs[0]),) * unsigned
    return ExactInt(product.limbs + sign)


def _sum_limbs(values: ExactInt) -> ExactInt:
    """Returns the sum over the first axis."""
    num, *rest = values.shape
    if num <= _MOST_ADDENDS:
        # In one reduction, because each is a kernel of its own.
        return _carried(list(jnp.sum(jnp.stack(_halves(values)), axis=1, dtype=jnp.uint32)))

    def pieces(limb: jax.Array) -> jax.Array:
        padded = jnp.pad(limb, [(0, -num % _MOST_ADDENDS)] + [(0, 0)] * len(rest))
        return padded.reshape(-1, _MOST_ADDENDS, *rest)

    halves = _halves(ExactInt(tuple(map(pieces, values.limbs))))
    return _sum_limbs(_carried([jnp.sum(half, axis=1, dtype=jnp.uint32) for half in halves]))


def _carried(columns: Sequence[jax.Array]) -> ExactInt:
    """Returns the sum of ``columns[i] << (16 * i)``."""
    digits = []
    carry = jnp.zeros_like(columns[0])
    for column in columns:
        total = (column & 0xFFFF) + carry
        digits.append(total & 0xFFFF)
        carry = (column >> 16) + (total >> 16)
    return ExactInt(
        tuple(low | high << 16 for low, high in zip(digits[::2], digits[1::2], strict=True))
    )


def negate_int(value: ExactInt) -> ExactInt:
    """Returns ``-value``."""
    flipped = ExactInt(tuple(~limb for limb in value.limbs))
    one = jnp.ones_like(value.limbs[0])
    return add_ints(flipped, ExactInt((one,) + (jnp.zeros_like(one),) * (len(value.limbs) - 1)))


def _sign(limb: jax.Array) -> jax.Array:
    """Returns 32 copies of the highest bit."""
    return (limb.astype(jnp.int32) >> 31).astype(jnp.uint32)


def _halves(value: ExactInt) -> Sequence[jax.Array]:
    return [half for limb in value.limbs for half in (limb & 0xFFFF, limb >> 16)]
