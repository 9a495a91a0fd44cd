"""The values of a record, from data for JSON and arrays beside it.

    value = Unpacker(trees).unpack(kept)

A stranger may have written the record. Nothing in it is trusted, and no module is imported and no
function called because the record names it.
"""

from __future__ import annotations

import base64
import collections
import math
import reprlib
import struct
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._checkpoint.dtypes import is_native, key_dtype, read_dtype
from jaxloop._checkpoint.packing import DICTS, ENUMS, FACTORIES, MOST_LEVELS
from jaxloop._core.times import EpochTime
from jaxloop._core.types import PyTree
from jaxloop.errors import DamagedError, SerializationError

MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error)
"""What Python and NumPy raise for a record whose checksum is right and whose content is not."""

_MOST_AXES = 64
"""NumPy's limit."""

_MOST_ELEMENTS = 2**63


def on_device(array: np.ndarray[Any, Any] | np.generic) -> jax.Array:
    """Returns an array on the device.

    Raises:
        SerializationError: JAX would change its dtype.
    """
    placed: jax.Array = jax.device_put(array)  # `jnp.asarray` would compile a program
    if placed.dtype != array.dtype:
        raise SerializationError(
            f"an array on the device must be {array.dtype}, as it was saved, got {placed.dtype}",
            fix="set jax_enable_x64 as the run that wrote the state did",
        )
    return placed


# How a leaf of a tree comes back: on the device, with a weak type, as an array or as a scalar.
_LEAF_KINDS: dict[str, Callable[[Any], Any]] = {
    "d": lambda leaf: leaf,
    "w": lambda leaf: _weak(leaf),
    "a": lambda leaf: np.array(leaf),
    "s": lambda leaf: np.asarray(leaf)[()],
}


class Unpacker:
    """Undoes `Packer`. It reads what a stranger may have written.

    Args:
        trees: The trees of the state, with the handlers' arrays under "arrays". Each may be used
            once, because a small record could otherwise make many copies of a large array.
    """

    def __init__(self, trees: Mapping[str, PyTree]) -> None:
        self._arrays = dict(trees["arrays"])
        self._trees = {name: tree for name, tree in trees.items() if name.startswith("like_")}
        self._num_levels = 0

    def unpack(self, kept: Any) -> Any:
        """Returns the value.

        Raises:
            DamagedError: `Packer` never returns such data.
            SerializationError: The value needs a PRNG, a processor or an option of JAX that this
                process does not have.
        """
        if not isinstance(kept, dict):
            if isinstance(kept, list):
                raise _malformed(kept)
            return kept
        tags = [name for name in kept if name in _READERS]
        # A container takes at most two levels, and the value in it a few more.
        if len(tags) != 1 or self._num_levels > 2 * MOST_LEVELS + 8:
            raise _malformed(kept)
        self._num_levels += 1
        try:
            return _READERS[tags[0]](self, kept)
        except SerializationError:
            raise
        except MALFORMED as error:
            raise _malformed(kept) from error
        finally:
            self._num_levels -= 1

    def table(self, kept: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Undoes `Packer.columns`."""
        rows: list[int] = kept["rows"]
        table: dict[int, dict[str, Any]] = {row: {} for row in rows}
        for name, mine, values in kept["columns"]:
            column = self._native_array(values)
            for row, value in zip(rows if mine is None else mine, column, strict=True):
                table[row][name] = value
        for row, others in self.unpack(kept["others"]).items():
            table[row].update(others)
        if not all(type(row) is int and row >= 0 for row in table) or len(table) != len(rows):
            raise _malformed(rows)
        return table

    def _native_array(self, kept: dict[str, Any]) -> np.ndarray[Any, Any]:
        array = self.unpack(kept)
        if not isinstance(array, np.ndarray) or not is_native(array.dtype):
            raise _malformed(kept)
        return array

    def _items(self, kept: Any) -> list[Any]:
        if not isinstance(kept, list):
            raise _malformed(kept)
        return [self.unpack(item) for item in kept]

    def _numpy_text(self, kept: dict[str, Any]) -> Any:
        value = self.unpack(kept["$numpy"])
        if type(value) not in (str, bytes):
            raise _malformed(kept)
        return np.str_(value) if type(value) is str else np.bytes_(value)

    def _float(self, kept: Any) -> float:
        value = self.unpack(kept)
        if type(value) not in (float, int):
            raise _malformed(kept)
        return float(value)

    def _bytes(self, kept: Any) -> bytes:
        if isinstance(kept, dict):
            return self._native_array(kept).tobytes()
        return base64.b64decode(kept, validate=True)

    def _array(self, kept: dict[str, Any]) -> Any:
        if "$at" in kept:
            array = np.asarray(self._arrays.pop(kept["$at"]))
            if "dtype" in kept:
                array = _reshaped(array.tobytes(), kept)
        else:
            array = _reshaped(base64.b64decode(kept["$array"], validate=True), kept)
        if kept.get("device"):
            placed = on_device(array)
            return _weak(placed) if kept.get("weak") else placed
        return array if kept.get("zero_d") else array[()]

    def _object_array(self, kept: dict[str, Any]) -> Any:
        array = np.empty(len(kept["$object"]), object)
        for i, item in enumerate(self._items(kept["$object"])):
            array[i] = item
        return array.reshape(_shape(kept["shape"]))

    def _masked(self, kept: dict[str, Any]) -> Any:
        data, mask = self.unpack(kept["$masked"]), self.unpack(kept["mask"])
        if not isinstance(data, np.ndarray):
            raise _malformed(kept)
        if mask is not None and (
            type(mask) is not np.ndarray
            or mask.shape != data.shape
            or mask.dtype != np.ma.make_mask_descr(data.dtype)
        ):
            raise _malformed(kept)
        return np.ma.MaskedArray(
            data,
            np.ma.nomask if mask is None else mask,
            fill_value=self.unpack(kept["fill"]),
            hard_mask=bool(kept["hard"]),
        )

    def _key(self, kept: dict[str, Any]) -> jax.Array:
        data, impl = self.unpack(kept["$key"]), kept["impl"]
        if not isinstance(data, np.ndarray) or data.dtype != np.uint32 or type(impl) is not str:
            raise _malformed(kept)
        key_dtype(impl)  # it says if JAX does not know the implementation
        return jax.random.wrap_key_data(jax.device_put(data), impl=impl)

    def _tensor(self, kept: dict[str, Any]) -> Any:
        array = np.array(self.unpack(kept["$torch"]))
        # A record must not decide what is imported. If the data need tensors, the script has torch.
        torch = sys.modules.get("torch")
        if torch is None:
            warnings.warn(
                "a state has a PyTorch tensor, which is read as a NumPy array, because torch is "
                "not imported; import torch before you read the state to get a tensor",
                stacklevel=2,
            )
            return array
        return torch.from_numpy(array)

    def _like(self, kept: dict[str, Any]) -> PyTree:
        tree = self._trees.pop(kept["$like"])
        leaves, tree_structure = jax.tree.flatten(tree)
        kinds = kept.get("kinds", "d" * len(leaves))
        made = [_LEAF_KINDS[kind](leaf) for kind, leaf in zip(kinds, leaves, strict=True)]
        return jax.tree.unflatten(tree_structure, made)

    def _dict(self, kept: dict[str, Any]) -> Any:
        made = {self.unpack(key): self.unpack(value) for key, value in kept["$dict"]}
        kind = kept.get("kind")
        if kind is None:
            return made
        if kind == "defaultdict":
            factory = kept["factory"]
            return collections.defaultdict(None if factory is None else FACTORIES[factory], made)
        return DICTS[kind](made)


_READERS: dict[str, Callable[[Unpacker, dict[str, Any]], Any]] = {
    "$array": Unpacker._array,
    "$at": Unpacker._array,
    "$object": Unpacker._object_array,
    "$masked": Unpacker._masked,
    "$key": Unpacker._key,
    "$torch": Unpacker._tensor,
    "$like": Unpacker._like,
    "$dict": Unpacker._dict,
    "$tuple": lambda unpacker, kept: tuple(unpacker._items(kept["$tuple"])),
    "$list": lambda unpacker, kept: unpacker._items(kept["$list"]),
    "$bytes": lambda unpacker, kept: unpacker._bytes(kept["$bytes"]),
    "$text": lambda unpacker, kept: unpacker._bytes(kept["$text"]).decode("utf-8", "surrogatepass"),
    "$numpy": Unpacker._numpy_text,
    "$int": lambda unpacker, kept: int(kept["$int"], 16),
    "$float": lambda unpacker, kept: struct.unpack("<d", bytes.fromhex(kept["$float"]))[0],
    "$complex": lambda unpacker, kept: complex(*map(unpacker._float, kept["$complex"])),
    "$time": lambda unpacker, kept: EpochTime(*map(unpacker._float, kept["$time"])),
    "$enum": lambda unpacker, kept: ENUMS[kept["kind"]](kept["$enum"]),
}


def _weak(array: jax.Array) -> jax.Array:
    """Returns the array with a weak type, as JAX gives to a Python number."""
    number: Any = {"i": 0, "c": 0j}.get(array.dtype.kind, 0.0)
    weak = jnp.full(array.shape, number).at[...].set(array)
    if weak.dtype != array.dtype:
        raise _malformed(str(array.dtype))
    return weak


def _reshaped(raw: bytes, kept: dict[str, Any]) -> np.ndarray[Any, Any]:
    dtype, shape = read_dtype(kept["dtype"]), _shape(kept["shape"])
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise _malformed(kept)
    array = np.frombuffer(raw, dtype).reshape(shape).copy()
    _check_text(array)
    return array


def _check_text(array: np.ndarray[Any, Any]) -> None:
    """Raises if an array of text has a number that is no character, which Python cannot read."""
    for name in array.dtype.names or ():
        _check_text(array[name])
    if array.dtype.kind == "U":
        codes = np.ascontiguousarray(array).reshape(-1).view(array.dtype.byteorder + "u4")
        if (codes > sys.maxunicode).any():
            raise _malformed("text with numbers that are no characters")


def _shape(kept: Any) -> tuple[int, ...]:
    if not is_shape(kept):
        raise _malformed(kept)
    return tuple(kept)


def is_shape(kept: Any) -> bool:
    """Returns whether data from JSON are a shape, of an array whose size can be counted."""
    return (
        isinstance(kept, list)
        and len(kept) <= _MOST_AXES
        and all(type(size) is int and 0 <= size < _MOST_ELEMENTS for size in kept)
        and math.prod(size or 1 for size in kept) < _MOST_ELEMENTS
    )


def _malformed(kept: Any) -> DamagedError:
    return DamagedError(
        f"a record must hold values as jaxloop writes them, got {reprlib.repr(kept)}",
        fix="use another copy",
    )
