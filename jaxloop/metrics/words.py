"""Arrays as words of 32 bits, without the loss of a bit.

    words = to_words(jnp.ones((2, 3)))              # uint32, of shape (6,)
    array = from_words(words, (2, 3), jnp.float32)

Small integers and bools take one word each, and numbers of 64 bits two.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

WORD_BITS = 32


def has_words(dtype: Any) -> bool:
    """Returns whether arrays of a dtype can be words. Typed keys cannot."""
    return not jax.dtypes.issubdtype(dtype, jax.dtypes.extended)


def num_words(shape: tuple[int, ...], dtype: Any) -> int:
    """Returns how many words an array takes."""
    return math.prod(shape) * max(1, 8 * jnp.dtype(dtype).itemsize // WORD_BITS)


def to_words(array: jax.Array) -> jax.Array:
    """Returns the bits of an array as a vector of uint32."""
    dtype = array.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        both = jnp.stack([jnp.real(array), jnp.imag(array)], axis=-1)
        return to_words(both)
    if dtype.itemsize >= 4:
        return lax.bitcast_convert_type(array, jnp.uint32).reshape(-1)
    if jnp.issubdtype(dtype, jnp.signedinteger):
        array = array.astype(jnp.int32)  # also int4, which has no bits of its own
    elif dtype != jnp.bool_ and not jnp.issubdtype(dtype, jnp.unsignedinteger):
        array = lax.bitcast_convert_type(array, _small_uint(dtype))
    return array.astype(jnp.uint32).reshape(-1)


def from_words(words: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns the array of a vector that `to_words` made."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        part = jnp.finfo(dtype).dtype
        both = from_words(words, (*shape, 2), part)
        return lax.complex(both[..., 0], both[..., 1])
    if dtype.itemsize >= 4:
        per_number = dtype.itemsize * 8 // WORD_BITS
        split = words.reshape((*shape, per_number) if per_number > 1 else shape)
        return lax.bitcast_convert_type(split, dtype)
    words = words.reshape(shape)
    if dtype == jnp.bool_:
        return words != 0
    if jnp.issubdtype(dtype, jnp.signedinteger):
        return words.astype(jnp.int32).astype(dtype)
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return words.astype(dtype)
    return lax.bitcast_convert_type(words.astype(_small_uint(dtype)), dtype)


def _small_uint(dtype: Any) -> Any:
    return jnp.uint8 if dtype.itemsize == 1 else jnp.uint16
