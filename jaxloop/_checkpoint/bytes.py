"""A `State` as bytes: versioned, checksummed, without pickle.

    data = serialize_state(state)
    state = deserialize_state(data, like=state.step_state)

Nothing in the bytes is interpreted before their checksum is verified.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._checkpoint.record import (
    NUMBERED,
    check_leaves,
    is_key,
    numbered,
    pack,
    step_state_of,
    unpack,
)
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop.errors import SerializationError

_MAGIC = b"JAXLOOP\x01"


_CHECKSUM_BYTES = 32


def _raw(leaf: Any) -> np.ndarray[Any, Any]:
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def serialize_state(
    state: State,
    *,
    compress: bool = False,
    serialize_step_state: Callable[[PyTree], bytes] | None = None,
) -> bytes:
    """Returns a state as bytes: versioned, with a checksum, without pickle.

    Args:
        state: A `State`.
        compress: Whether to compress with zlib.
        serialize_step_state: Converts the step state to bytes, if it has leaves of your own types.

    Returns:
        Bytes for `deserialize_state`.

    Raises:
        SerializationError: Something in the state cannot be serialized.

    Example:
        >>> import jaxloop as jl
        >>> state = jl.loop(lambda b, s: s + b).run([1, 2], init_state=0)
        >>> int(deserialize_state(serialize_state(state), like=state).step_state)
        3
    """
    if serialize_step_state is not None:
        own = serialize_step_state(state.loan.step_state)
        state = state.replace(step_state={})
        record, trees = pack(state)
        record["own"] = True
    else:
        own = b""
        record, trees = pack(state)
    chunks = [own]
    record["own_bytes"] = len(own)
    for tree in trees.values():
        for leaf in jax.tree.leaves(tree):
            chunks.append(_raw(leaf).tobytes())
    record["trees"] = list(trees)
    header = json.dumps(record).encode()
    body = struct.pack("<Q", len(header)) + header + b"".join(chunks)
    if compress:
        body = zlib.compress(body)
    flag = b"\x01" if compress else b"\x00"
    return _MAGIC + flag + hashlib.sha256(flag + body).digest() + body


def deserialize_state(
    data: bytes,
    *,
    like: State | PyTree,
    deserialize_step_state: Callable[[bytes], PyTree] | None = None,
) -> State:
    """Restores a state from the bytes that `serialize_state` returned.

    Args:
        data: The bytes.
        like: A `State`, or a step state of the same structure, shapes and dtypes.
        deserialize_step_state: The inverse of ``serialize_step_state``.

    Returns:
        A `State`.

    Raises:
        SerializationError: The bytes are not a state, are truncated or altered, or do not match
            ``like``.

    Example:
        >>> deserialize_state(b"nonsense", like={})
        Traceback (most recent call last):
        jaxloop.errors.SerializationError: these bytes are not a serialized state...
    """
    start = len(_MAGIC) + 1 + _CHECKSUM_BYTES
    if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
        raise SerializationError(
            "these bytes are not a serialized state of this format",
            fix="pass bytes that jl.serialize_state returned",
        )
    flag, body = data[len(_MAGIC) : len(_MAGIC) + 1], data[start:]
    if hashlib.sha256(flag + body).digest() != data[len(_MAGIC) + 1 : start]:
        raise SerializationError(
            "the bytes of this state are damaged: their checksum differs",
            fix="read the bytes again, or use another copy",
        )
    if flag == b"\x01":
        body = zlib.decompress(body)
    (size,) = struct.unpack("<Q", body[:8])
    record, rest = json.loads(body[8 : 8 + size]), body[8 + size :]
    step_like = step_state_of(like)
    own, rest = rest[: record["own_bytes"]], rest[record["own_bytes"] :]
    if record.get("own"):
        if deserialize_step_state is None:
            raise SerializationError(
                "this state was written with serialize_step_state=",
                fix="pass deserialize_step_state= too",
            )
        step_like = {}
    else:
        check_leaves(record, step_like, "the serialized state")
    trees: dict[str, PyTree] = {}
    for name in record["trees"]:
        leaves = []
        models = (
            [None] * len(record["leaves"][name]) if name in NUMBERED else jax.tree.leaves(step_like)
        )
        for model, (_, dtype, shape) in zip(models, record["leaves"][name], strict=True):
            leaf, rest = _take(rest, model, dtype, shape)
            # Handlers' arrays stay NumPy arrays, because JAX does not have every dtype.
            leaves.append(leaf if name == "arrays" or is_key(leaf) else jnp.asarray(leaf))
        if name in NUMBERED:
            trees[name] = numbered(leaves)
        else:
            trees[name] = jax.tree.unflatten(jax.tree.structure(step_like), leaves)
    state = unpack(record, trees)
    if record.get("own"):
        assert deserialize_step_state is not None
        state = state.replace(step_state=deserialize_step_state(own))
    return state


def _take(rest: bytes, model: Any, dtype: str, shape: list[int]) -> tuple[Any, bytes]:
    if model is not None and is_key(model):
        data = jax.random.key_data(model)
        size = data.size * data.dtype.itemsize
        raw = np.frombuffer(rest[:size], data.dtype).reshape(data.shape)
        key = jax.random.wrap_key_data(jnp.asarray(raw), impl=jax.random.key_impl(model))
        return key, rest[size:]
    kind = jnp.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer(rest[:size], kind).reshape(shape).copy(), rest[size:]
