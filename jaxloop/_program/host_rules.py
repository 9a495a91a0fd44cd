"""The operations of JAX that NumPy computes with the bits of XLA, each with its rule.

    fn = RULES[equation.primitive.name](equation)        # or UnsupportedError
    fn(*rows)                                            # NumPy arrays with a leading axis of rows

Invariant: an operation in the table is exact or rounds once, so its result does not depend on how
it is computed. The one exception: XLA's CPU backend flushes subnormal numbers to zero, and NumPy
keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend.core import JaxprEqn, Literal

HostArray: TypeAlias = np.ndarray[Any, Any]
"""An array of NumPy. Inside an evaluation it has a leading axis of rows, of length 1 if it is a
constant."""

Fn: TypeAlias = Callable[..., HostArray]

Rule: TypeAlias = Callable[[JaxprEqn], Fn]
"""Makes the function of an equation. Raises `UnsupportedError` for some dtypes and parameters."""


class UnsupportedError(Exception):
    """NumPy does not compute an operation with the bits of XLA."""


def of_rows(array: HostArray, num_rows: int) -> HostArray:
    """Returns a copy with so many rows, for a constant or for rows that share memory."""
    copy = np.empty((num_rows, *array.shape[1:]), array.dtype)
    copy[...] = array
    return copy


def kind_of(aval: Any) -> str:
    """Returns the kind of a dtype: b(ool), i(nt), u(int), f(loat) or h(alf).

    Raises:
        UnsupportedError: It is another one, such as a complex number or a PRNG key.
    """
    dtype = aval.dtype
    if isinstance(dtype, np.dtype):
        if dtype.name in ("float16", "bfloat16"):
            return "h"
        if dtype.kind in "biuf":
            return dtype.kind
    raise UnsupportedError


def _input(equation: JaxprEqn, index: int = 0) -> Any:
    return equation.invars[index].aval


def _output(equation: JaxprEqn) -> Any:
    return equation.outvars[0].aval


# --- elementwise operations ----------------------------------------------------------------------


def _elementwise(kinds: str, fn: Fn, *others: tuple[str, Fn]) -> Rule:
    """Makes the rule of a function of arrays that broadcast to the shape of the result.

    Args:
        kinds: The kinds of the last input for which ``fn`` is right.
        fn: A function of arrays.
        *others: Other kinds, each with its function.
    """

    def rule(equation: JaxprEqn) -> Fn:
        kind = kind_of(_input(equation, -1))
        for some, function in ((kinds, fn), *others):
            if kind in some:
                return _aligned(equation, function)
        raise UnsupportedError

    return rule


def _aligned(equation: JaxprEqn, fn: Fn) -> Fn:
    """Lets scalars broadcast: one number a row must have as many axes as the result."""
    ndim = len(_output(equation).shape)
    # A literal has the shape (1,), which broadcasts as it is.
    short = [
        len(_input(equation, i).shape) < ndim and not isinstance(atom, Literal)
        for i, atom in enumerate(equation.invars)
    ]
    if not any(short):
        return fn
    ones = (1,) * ndim

    def aligned(*inputs: HostArray) -> HostArray:
        return fn(
            *(x.reshape(len(x), *ones) if s else x for x, s in zip(inputs, short, strict=True))
        )

    return aligned


def _maximum(x: HostArray, y: HostArray) -> HostArray:
    # Of two zeros, XLA takes the positive one as the larger one. NumPy takes either.
    return np.where((x == 0) & (y == 0), x + y, np.maximum(x, y))


def _minimum(x: HostArray, y: HostArray) -> HostArray:
    return np.negative(_maximum(np.negative(x), np.negative(y)))


def _sign(x: HostArray) -> HostArray:
    return np.where(x == 0, x, np.sign(x))  # keeps the sign of zero


def _quotient(x: HostArray, y: HostArray) -> HostArray:
    """Divides integers as XLA does: rounded toward zero, and -1 where the divisor is 0."""
    floor = np.floor_divide(x, y)
    inexact = np.remainder(x, y) != 0
    rounded = floor + (inexact & ((x < 0) != (y < 0))).astype(x.dtype)
    return np.where(y == 0, ~np.zeros_like(x), rounded)


def _remainder(x: HostArray, y: HostArray) -> HostArray:
    return np.where(y == 0, x, np.fmod(x, y))


def _shift_right_logical(x: HostArray, y: HostArray) -> HostArray:
    bits = np.dtype(f"u{x.dtype.itemsize}")
    return np.right_shift(x.view(bits), y.view(bits)).view(x.dtype)


def _shift_right_arithmetic(x: HostArray, y: HostArray) -> HostArray:
    bits = np.dtype(f"i{x.dtype.itemsize}")  # also of unsigned numbers
    return np.right_shift(x.view(bits), y.view(bits)).view(x.dtype)


def _select(which: HostArray, if_false: HostArray, if_true: HostArray) -> HostArray:
    return np.where(which, if_true, if_false)


def _select_rule(equation: JaxprEqn) -> Fn:
    if len(equation.invars) != 3 or kind_of(_input(equation)) != "b":
        raise UnsupportedError
    return _aligned(equation, _select)


def _power_rule(equation: JaxprEqn) -> Fn:
    if equation.params["y"] != 2:  # any other one rounds more than once
        raise UnsupportedError
    return RULES["square"](equation)


def _round_rule(equation: JaxprEqn) -> Fn:
    if equation.params["rounding_method"] != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        raise UnsupportedError
    return _elementwise("f", np.rint)(equation)


def _convert_rule(equation: JaxprEqn) -> Fn:
    old, new = _input(equation), _output(equation)
    dtype = new.dtype
    kinds = kind_of(old) + kind_of(new)
    if "h" in kinds and old.dtype != dtype and kinds != "hf" and old.dtype != np.float32:
        raise UnsupportedError  # NumPy rounds to float32 first
    if kinds in ("fi", "fu"):
        return lambda x: _saturated(x, dtype)
    return lambda x: x.astype(dtype, copy=False)


def _saturated(x: HostArray, dtype: np.dtype[Any]) -> HostArray:
    """Converts floats to integers as XLA does: NaN to 0, and what does not fit to the limits."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    too_low, too_high = x <= float(low), x >= float(high) + (high < 2**53)
    fits = ~(too_low | too_high | np.isnan(x))
    whole = np.where(fits, x, np.zeros_like(x)).astype(dtype)
    whole[too_low], whole[too_high] = low, high
    return whole


# --- shapes: axis k of a row is axis k + 1 here --------------------------------------------------


def _broadcast_rule(equation: JaxprEqn) -> Fn:
    shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
    if len(equation.invars) != 1:
        raise UnsupportedError
    aligned = [1] * len(shape)
    for axis, size in zip(axes, _input(equation).shape, strict=True):
        aligned[axis] = size

    def broadcast(x: HostArray) -> HostArray:
        result = np.empty((len(x), *shape), x.dtype)
        result[...] = x.reshape(len(x), *aligned)
        return result

    return broadcast


def _reshape_rule(equation: JaxprEqn) -> Fn:
    if len(equation.invars) != 1 or equation.params["dimensions"] is not None:
        raise UnsupportedError
    return _squeeze_rule(equation)


def _squeeze_rule(equation: JaxprEqn) -> Fn:
    shape = _output(equation).shape
    return lambda x: x.reshape(len(x), *shape)


def _slice_rule(equation: JaxprEqn) -> Fn:
    start, stop = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(start)
    index = (slice(None), *map(slice, start, stop, strides))
    return lambda x: x[index]


def _join(function: Callable[..., HostArray], parameter: str) -> Rule:
    """Makes the rule of a function that joins arrays along an axis."""

    def rule(equation: JaxprEqn) -> Fn:
        axis = equation.params[parameter] + 1

        def join(*parts: HostArray) -> HostArray:
            lengths = set(map(len, parts))
            if len(lengths) > 1:  # constants have one row
                (rows,) = lengths - {1}
                parts = tuple(of_rows(part, rows) if len(part) == 1 else part for part in parts)
            return function(parts, axis)

        return join

    return rule


def _transpose_rule(equation: JaxprEqn) -> Fn:
    axes = (0, *(axis + 1 for axis in equation.params["permutation"]))
    return lambda x: x.transpose(axes)


def _reverse_rule(equation: JaxprEqn) -> Fn:
    axes = tuple(axis + 1 for axis in equation.params["dimensions"])
    return lambda x: np.flip(x, axes)


def _pad_rule(equation: JaxprEqn) -> Fn:
    config = equation.params["padding_config"]
    if any(low < 0 or high < 0 or interior for low, high, interior in config):
        raise UnsupportedError
    shape = _output(equation).shape
    ones = (1,) * len(shape)
    inner = zip(config, _input(equation).shape, strict=True)
    index = (slice(None), *(slice(low, low + size) for (low, _, _), size in inner))

    def pad(x: HostArray, value: HostArray) -> HostArray:
        rows = len(x) if len(value) == 1 else len(value)
        result = np.empty((rows, *shape), x.dtype)
        result[...] = value.reshape(len(value), *ones)
        result[index] = x
        return result

    return pad


def _iota_rule(equation: JaxprEqn) -> Fn:
    shape, axis, dtype = (equation.params[name] for name in ("shape", "dimension", "dtype"))
    if equation.invars:
        raise UnsupportedError
    numbers = np.arange(shape[axis]).astype(dtype).reshape(-1, *(1,) * (len(shape) - axis - 1))
    return lambda: np.broadcast_to(numbers, (1, *shape))


def _bitcast_rule(equation: JaxprEqn) -> Fn:
    old, new = _input(equation), _output(equation)
    dtype, shape = new.dtype, new.shape
    if "b" in kind_of(old) + kind_of(new):
        raise UnsupportedError
    if old.dtype.itemsize == dtype.itemsize:
        return lambda x: x.view(dtype)
    ending = (1,) * (old.dtype.itemsize > dtype.itemsize)  # one number becomes several
    inner = (*old.shape, *ending)
    return lambda x: (
        np.ascontiguousarray(x).reshape(len(x), *inner).view(dtype).reshape(len(x), *shape)
    )


def _reduce(kinds: str, function: np.ufunc) -> Rule:
    """Makes the rule of a reduction that has the same result in any order."""

    def rule(equation: JaxprEqn) -> Fn:
        aval = _output(equation)
        if len(equation.invars) != 1 or kind_of(aval) not in kinds:
            raise UnsupportedError
        axes, dtype = tuple(axis + 1 for axis in equation.params["axes"]), aval.dtype
        return lambda x: function.reduce(x, axes, dtype)

    return rule


def _sums_rule(equation: JaxprEqn) -> Fn:
    aval, axis = _output(equation), equation.params["axis"] + 1
    if kind_of(aval) not in "iu":
        raise UnsupportedError
    dtype, step = aval.dtype, -1 if equation.params["reverse"] else 1
    index = (slice(None),) * axis + (slice(None, None, step),)
    return lambda x: np.cumsum(x[index], axis, dtype)[index]


def _index_rule(function: Callable[..., Any]) -> Rule:
    def rule(equation: JaxprEqn) -> Fn:
        (axis,), dtype = equation.params["axes"], equation.params["index_dtype"]
        if kind_of(_input(equation)) not in "biuf":
            raise UnsupportedError
        return lambda x: function(x, axis + 1).astype(dtype)

    return rule


VIEWS = frozenset(
    {
        "bitcast_convert_type",
        "convert_element_type",
        "copy",
        "copy_p",
        "reshape",
        "rev",
        "slice",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)
"""The primitives whose result may share memory with their input."""

RULES: dict[str, Rule] = {
    "abs": _elementwise("if", np.abs),
    "add": _elementwise("iuf", np.add),
    "and": _elementwise("biu", np.bitwise_and),
    "argmax": _index_rule(np.argmax),
    "argmin": _index_rule(np.argmin),
    "bitcast_convert_type": _bitcast_rule,
    "broadcast_in_dim": _broadcast_rule,
    "ceil": _elementwise("f", np.ceil),
    "clamp": _elementwise(
        "iu",
        lambda low, x, high: np.minimum(np.maximum(low, x), high),
        ("f", lambda low, x, high: _minimum(_maximum(low, x), high)),
    ),
    "concatenate": _join(np.concatenate, "dimension"),
    "convert_element_type": _convert_rule,
    "copy": lambda equation: lambda x: x,
    "copy_p": lambda equation: lambda x: x,
    "cumsum": _sums_rule,
    "div": _elementwise("f", np.divide, ("iu", _quotient)),
    "eq": _elementwise("biufh", np.equal),
    "floor": _elementwise("f", np.floor),
    "ge": _elementwise("biufh", np.greater_equal),
    "gt": _elementwise("biufh", np.greater),
    "integer_pow": _power_rule,
    "iota": _iota_rule,
    "is_finite": _elementwise("fh", np.isfinite),
    "le": _elementwise("biufh", np.less_equal),
    "lt": _elementwise("biufh", np.less),
    "max": _elementwise("biu", np.maximum, ("f", _maximum)),
    "min": _elementwise("biu", np.minimum, ("f", _minimum)),
    "mul": _elementwise("iuf", np.multiply),
    "ne": _elementwise("biufh", np.not_equal),
    "neg": _elementwise("iuf", np.negative),
    "not": _elementwise("biu", np.invert),
    "or": _elementwise("biu", np.bitwise_or),
    "pad": _pad_rule,
    "reduce_and": _reduce("biu", np.bitwise_and),
    "reduce_max": _reduce("biu", np.maximum),
    "reduce_min": _reduce("biu", np.minimum),
    "reduce_or": _reduce("biu", np.bitwise_or),
    "reduce_sum": _reduce("iu", np.add),
    "rem": _elementwise("iu", _remainder),
    "reshape": _reshape_rule,
    "rev": _reverse_rule,
    "round": _round_rule,
    "select_n": _select_rule,
    "shift_left": _elementwise("iu", np.left_shift),
    "shift_right_arithmetic": _elementwise("iu", _shift_right_arithmetic),
    "shift_right_logical": _elementwise("iu", _shift_right_logical),
    "sign": _elementwise("iu", np.sign, ("f", _sign)),
    "slice": _slice_rule,
    "sqrt": _elementwise("f", np.sqrt),
    "square": _elementwise("iuf", np.square),
    "squeeze": _squeeze_rule,
    "stack": _join(np.stack, "axis"),
    "stop_gradient": lambda equation: lambda x: x,
    "sub": _elementwise("iuf", np.subtract),
    "transpose": _transpose_rule,
    "xor": _elementwise("biu", np.bitwise_xor),
}
"""The operations that are exact or round once. A sum of floats, for example, rounds in an order
that only XLA knows."""
