"""A `State` as bytes: versioned, checksummed, without pickle.

    data = serialize_state(state)
    state = deserialize_state(data, like=state.step_state)

Nothing in the bytes is interpreted before their checksum is verified. A stranger may have computed
that checksum, so every size in them is compared with the bytes that exist, and with ``like``,
before any memory is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._checkpoint.dtypes import leaf_dtype
from jaxloop._checkpoint.older import as_now, as_saved
from jaxloop._checkpoint.parsing import parse
from jaxloop._checkpoint.record import (
    check_format,
    check_leaves,
    describe,
    numbered,
    pack,
    step_state_of,
    unpack,
)
from jaxloop._checkpoint.schema import MOST_BYTES, NUMBERED, check_size
from jaxloop._checkpoint.unpacking import on_device
from jaxloop._core.arrays import data_of, key_impl
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentTypeError, DamagedError, SerializationError

_MAGIC = b"JAXLOOP\x01"
_PLAIN, _COMPRESSED = b"\x00", b"\x01"
_CHECKSUM_BYTES = 32

# zlib expands a byte to a thousand. Compressed bytes may expand to this much more than a hundred
# times their size. If a state would expand more, `serialize_state` does not compress it.
_MOST_TIMES = 100
_EXTRA_HEADER = 2**22
_EXTRA_CONTENT = 2**26


def _raw(leaf: Any) -> bytes:
    return np.asarray(data_of(leaf)).tobytes()


def _checksum(flag: bytes, body: Any) -> bytes:
    digest = hashlib.sha256(flag)
    digest.update(body)
    return digest.digest()


def serialize_state(
    state: State,
    *,
    compress: bool = False,
    serialize_step_state: Callable[[PyTree], bytes] | None = None,
) -> bytes:
    """Returns a state as bytes: versioned, with a checksum, without pickle.

    Args:
        state: A `State`.
        compress: Whether to compress with zlib. A large state that consists of little but equal
            bytes is not compressed, because `deserialize_state` would take it for an attack.
        serialize_step_state: Converts the step state to bytes, if it has leaves of your own types.

    Returns:
        Bytes for `deserialize_state`.

    Raises:
        SerializationError: Something in the state cannot be serialized exactly. The error says
            what and where.

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
    record["own_bytes"] = len(own)
    record["trees"] = list(trees)
    header = json.dumps(record).encode()
    check_size(header)
    leaves = [leaf for tree in trees.values() for leaf in jax.tree.leaves(tree)]
    content = b"".join((own, *map(_raw, leaves)))
    flag, body = _PLAIN, b"".join((struct.pack("<Q", len(header)), header, content))
    if compress:
        small, known = zlib.compress(body), _num_bytes(state.loan.step_state)
        if _may_expand(small, len(header), _EXTRA_HEADER) and _may_expand(
            small, len(content), _EXTRA_CONTENT + known
        ):
            flag, body = _COMPRESSED, small
    return b"".join((_MAGIC, flag, _checksum(flag, body), body))


def deserialize_state(
    data: bytes,
    *,
    like: State | PyTree,
    deserialize_step_state: Callable[[bytes], PyTree] | None = None,
) -> State:
    """Restores a state from the bytes that `serialize_state` returned.

    The bytes may come from a stranger. They are never run, and decide nothing that is imported.
    Compressed bytes take at most 64 MB of memory, a hundred times their own size, and the size of
    ``like``.

    Args:
        data: The bytes.
        like: A `State`, or a step state of the same structure, shapes and dtypes.
        deserialize_step_state: The inverse of ``serialize_step_state``.

    Returns:
        A `State`.

    Raises:
        DamagedError: The bytes are not a state, or are truncated, altered or malformed.
        SerializationError: A later jaxloop wrote the bytes, or they do not match ``like``.
        ArgumentTypeError: ``data`` are not bytes.

    Example:
        >>> deserialize_state(b"nonsense", like={})
        Traceback (most recent call last):
        jaxloop.errors.DamagedError: these bytes are not a serialized state...
    """
    source = _open(data)
    record = parse(source.header())
    check_format(record)
    own_bytes = record.get("own_bytes")
    if own_bytes is None or record.get("trees") != list(record["leaves"]):
        raise _damaged("they do not say what they consist of")
    present = jax.tree.map(_as_array, step_state_of(like))
    step_like = as_saved(record, present)
    if record.get("own"):
        if deserialize_step_state is None:
            raise SerializationError(
                "this state was written with serialize_step_state=",
                fix="pass deserialize_step_state= too",
            )
        step_like = {}
    else:
        check_leaves(record, step_like, "the serialized state")
    models = {name: _models(name, leaves, step_like) for name, leaves in record["leaves"].items()}
    num_bytes = own_bytes + sum(map(_num_bytes, models.values()))
    rest = source.content(num_bytes, _num_bytes(step_like))
    own, at = bytes(rest[:own_bytes]), own_bytes
    trees: dict[str, PyTree] = {}
    for name, shapes in models.items():
        leaves = []
        for model in shapes:
            size = _num_bytes(model)
            leaves.append(_leaf(model, rest[at : at + size], on_host=name == "arrays"))
            at += size
        if name in NUMBERED:
            trees[name] = numbered(leaves)
        else:
            trees[name] = jax.tree.unflatten(jax.tree.structure(step_like), leaves)
    state = unpack(record, trees)
    if record.get("own"):
        assert deserialize_step_state is not None
        return state.replace(step_state=deserialize_step_state(own))
    return as_now(state, present)


# --- the leaves ----------------------------------------------------------------------------------


def _as_array(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "shape") else jnp.asarray(leaf)


def _models(name: str, leaves: list[Any], step_like: PyTree) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of the leaves of a tree."""
    if name in NUMBERED:
        return [jax.ShapeDtypeStruct(shape, leaf_dtype(dtype)) for _, dtype, shape in leaves]
    if leaves != describe(step_like):
        raise _damaged(f"their {name} has other leaves than a step state")
    return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(step_like)]


def _data_of(model: Any) -> Any:
    """Returns the shape and dtype of what is stored for a leaf. Keys are stored as their data."""
    if jax.dtypes.issubdtype(model.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(model.shape, model.dtype))
    return model


def _num_bytes(tree: PyTree) -> int:
    return sum(
        math.prod(data.shape) * int(data.dtype.itemsize)
        for data in map(_data_of, jax.tree.leaves(tree))
    )


def _leaf(model: Any, raw: memoryview, on_host: bool) -> Any:
    data = _data_of(model)
    array = np.frombuffer(raw, data.dtype).reshape(data.shape).copy()
    if on_host:  # handlers' arrays stay NumPy arrays, because JAX does not have every dtype
        return array
    if data is model:
        return on_device(array)
    return jax.random.wrap_key_data(jax.device_put(array), impl=key_impl(model.dtype))


# --- the bytes before they are interpreted -------------------------------------------------------


def _may_expand(small: Any, num_bytes: int, extra: int) -> bool:
    return num_bytes <= extra + _MOST_TIMES * len(small)


def _open(data: bytes) -> _Source:
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ArgumentTypeError(
            f"deserialize_state: data must be bytes, got {type(data).__name__}",
            fix="pass bytes that jl.serialize_state returned",
        )
    data = bytes(data)
    start = len(_MAGIC) + 1 + _CHECKSUM_BYTES
    if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
        raise DamagedError(
            "these bytes are not a serialized state of this format",
            fix="pass bytes that jl.serialize_state returned",
        )
    flag, body = data[len(_MAGIC) : len(_MAGIC) + 1], memoryview(data)[start:]
    if _checksum(flag, body) != data[len(_MAGIC) + 1 : start]:
        raise _damaged("their checksum differs")
    if flag not in (_PLAIN, _COMPRESSED):
        raise _damaged("they are neither plain nor compressed")
    return _Source(body, flag == _COMPRESSED)


class _Source:
    """The bytes of a state without their checksum, read in two steps.

    Args:
        body: The bytes.
        compressed: Whether they are compressed.
    """

    def __init__(self, body: memoryview, compressed: bool) -> None:
        self._all = self._left = body
        self._zlib = zlib.decompressobj() if compressed else None

    def header(self) -> bytes:
        """Returns the text of the record.

        Raises:
            DamagedError: It is cut off, or larger than that of any state.
        """
        (size,) = struct.unpack("<Q", self._take(8))
        if size > MOST_BYTES or not self._has(size, _EXTRA_HEADER):
            raise _damaged(f"their record cannot have {size} bytes")
        return bytes(self._take(size))

    def content(self, size: int, known: int) -> memoryview:
        """Returns what follows the header.

        Args:
            size: Its size, as the header says.
            known: The size of the step state that the caller passed.

        Raises:
            DamagedError: It has another size, or expands more than that of any state.
        """
        if not self._has(size, _EXTRA_CONTENT + known):
            raise _damaged(f"their arrays cannot have {size} bytes")
        content = self._take(size)
        if self._zlib is None:
            ended = not len(self._left)
        else:
            more = self._decompressed(1)
            ended = not more and self._zlib.eof and not self._zlib.unused_data
        if not ended:
            raise _damaged("they go on after their end")
        return content

    def _has(self, size: int, extra: int) -> bool:
        if self._zlib is None:
            return size <= len(self._left)
        return _may_expand(self._all, size, extra)

    def _take(self, size: int) -> memoryview:
        if self._zlib is None:
            taken, self._left = self._left[:size], self._left[size:]
        else:
            taken = memoryview(self._decompressed(size))
        if len(taken) != size:
            raise _damaged("they are cut off")
        return taken

    def _decompressed(self, size: int) -> bytes:
        """Returns the next ``size`` bytes, or fewer at the end."""
        assert self._zlib is not None
        if not size:
            return b""  # for zlib, zero means all
        try:
            taken = self._zlib.decompress(self._left, size)
        except zlib.error as error:
            raise _damaged(f"they cannot be decompressed: {error}") from error
        self._left = memoryview(self._zlib.unconsumed_tail)
        return taken


def _damaged(problem: str) -> DamagedError:
    return DamagedError(
        f"the bytes of this state are damaged: {problem}",
        fix="read the bytes again, or use another copy",
    )
