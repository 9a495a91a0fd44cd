"""NumPy dtypes as data for JSON, and back.

    described = describe_dtype(np.dtype(">f4"))        # ">f4"
    dtype = read_dtype(described)

A dtype comes back exactly as it was, with its byte order, its fields and their padding. A dtype for
which that is not possible has no description. `read_dtype` accepts only what `describe_dtype`
returns, so a file cannot make NumPy parse anything else.
"""

from __future__ import annotations

import contextlib
import re
import reprlib
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from jaxloop.errors import DamagedError, SerializationError

_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")

# Such as ">f4", "<U3", "|V8", "<M8[25s]", and "datetime64[ns]", which is how format 1 wrote it.
_CODE = re.compile(
    r"[<>|][biufcSUV][1-9][0-9]{0,8}|([<>]?[mM]8|(datetime|timedelta)64)(\[[0-9]{0,9}[a-zA-Zμ]+\])?"
)
_SAME_AS_SIZED = ("longlong", "ulonglong")
"""C types that NumPy keeps apart from the sized type that equals them."""

_LONG_DOUBLE = ("longdouble", "clongdouble")
_MANTISSA_BITS = int(np.finfo(np.longdouble).nmant)
"""Processors differ in what a long double is."""

_PRNGS = ("threefry2x32", "rbg", "unsafe_rbg", "philox2x32", "philox4x32")
"""The PRNG implementations of JAX. Older versions have fewer."""


def is_native(dtype: Any) -> bool:
    """Returns whether JAX has the dtype, so that its name is enough and Orbax can store it.

    Example:
        >>> is_native(np.dtype("int8")), is_native(np.dtype(">i4")), is_native(np.dtype("U3"))
        (True, False, False)
    """
    # The code and the metadata are no part of ``==``, by which the cache compares.
    return isinstance(dtype, np.dtype) and dtype.metadata is None and _has_name(dtype, dtype.char)


@lru_cache(256)
def _has_name(dtype: np.dtype[Any], char: str) -> bool:
    return (
        (dtype == np.bool_ or jax.dtypes.issubdtype(dtype, np.number))
        and _NAME.fullmatch(dtype.name) is not None
        and char not in "gG"  # a long double
        and np.dtype(dtype.name).char == char
        and np.dtype(dtype.name) == dtype
    )


def describe_dtype(dtype: np.dtype[Any]) -> Any:
    """Returns a dtype as data for JSON, or None if it cannot be described exactly.

    Example:
        >>> describe_dtype(np.dtype("float32")), describe_dtype(np.dtype(object))
        ('float32', None)
    """
    try:
        described = _described(dtype)
        # A repr shows titles and alignment, which ``==`` ignores.
        same = repr(read_dtype(described)) == repr(dtype)
    except SerializationError:
        return None
    return described if same else None


def _described(dtype: np.dtype[Any]) -> Any:
    if dtype.metadata:
        raise _malformed(dtype)
    if is_native(dtype):
        return dtype.name
    if dtype.names is not None and dtype.fields is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        return {
            "names": list(dtype.names),
            "formats": [_described(field[0]) for field in fields],
            "offsets": [int(field[1]) for field in fields],
            "itemsize": dtype.itemsize,
            "aligned": dtype.isalignedstruct,
        }
    if dtype.subdtype is not None:
        return {"base": _described(dtype.subdtype[0]), "shape": list(dtype.subdtype[1])}
    if dtype.char in "gG":
        name = _LONG_DOUBLE[dtype.char == "G"]
        return {"name": name, "swapped": not dtype.isnative, "mantissa_bits": _MANTISSA_BITS}
    if dtype.isnative and dtype.type.__name__ in _SAME_AS_SIZED:
        return dtype.type.__name__
    return dtype.str


def read_dtype(described: Any) -> np.dtype[Any]:
    """Undoes `describe_dtype`. The dtype never holds Python objects.

    Raises:
        DamagedError: This is not the description of a dtype.
        SerializationError: It is the long double of another kind of processor.
    """
    try:
        dtype = _read(described)
    except SerializationError:
        raise
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise _malformed(described) from error
    if dtype.hasobject or not dtype.itemsize:
        raise _malformed(described)
    return dtype


def _read(described: Any) -> np.dtype[Any]:
    if isinstance(described, str):
        if _CODE.fullmatch(described) or described in _SAME_AS_SIZED:
            return np.dtype(described)
        return _named(described)
    if "base" in described:
        shape = tuple(described["shape"])
        return np.dtype((read_dtype(described["base"]), shape))
    if "names" in described:
        fields: Any = {name: described[name] for name in ("names", "offsets", "itemsize")}
        fields["formats"] = [read_dtype(one) for one in described["formats"]]
        made: np.dtype[Any] = np.dtype(fields, align=bool(described["aligned"]))
        return made
    if described["name"] not in _LONG_DOUBLE:
        raise _malformed(described)
    if described["mantissa_bits"] != _MANTISSA_BITS:
        raise SerializationError(
            f"a long double must have {_MANTISSA_BITS} bits of mantissa on this processor, got an "
            f"array with {described['mantissa_bits']!r:.20}",
            fix="read the state on the kind of processor that wrote it, or remember float64 arrays",
        )
    dtype = np.dtype(described["name"])
    return dtype.newbyteorder() if described["swapped"] else dtype


@lru_cache(64)
def _named(name: str) -> np.dtype[Any]:
    if name in ("float128", "complex256"):  # how format 1 wrote long doubles
        return np.dtype(_LONG_DOUBLE[name == "complex256"])
    dtype = np.dtype(name) if _NAME.fullmatch(name) else None
    if not is_native(dtype):
        raise _malformed(name)
    assert dtype is not None
    return dtype


def leaf_dtype(name: str) -> Any:
    """Returns the dtype of a leaf on the device, by its name: a native one, or that of keys.

    Raises:
        DamagedError: No dtype has this name.

    Example:
        >>> leaf_dtype("bfloat16"), leaf_dtype("key<rbg>")
        (dtype(bfloat16), key<rbg>)
    """
    if name.startswith("key<"):
        for impl in _PRNGS:
            with contextlib.suppress(SerializationError):
                if str(key_dtype(impl)) == name:
                    return key_dtype(impl)
    try:
        return _named(name)
    except TypeError as error:
        raise _malformed(name) from error


@lru_cache(64)
def key_dtype(impl: str) -> Any:
    """Returns the dtype of the keys of a PRNG implementation.

    Raises:
        SerializationError: The implementation is unknown.
    """
    try:
        return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype
    except (ValueError, TypeError) as error:
        raise SerializationError(
            f"a PRNG implementation must be one that JAX knows, got {impl!r:.40}",
            fix="register the implementation before you read the state",
        ) from error


@lru_cache(64)
def _malformed(described: Any) -> DamagedError:
    return DamagedError(
        f"a record must name dtypes as jaxloop writes them, got {reprlib.repr(described)}",
        fix="use another copy",
    )
