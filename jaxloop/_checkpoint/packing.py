"""Values that handlers remember, as data for JSON and arrays beside it.

    packer = Packer(trees, arrays, is_step_state)
    kept = packer.pack({"best": np.float32(3)}, "handler_state['mine']")

A value comes back exactly as it was, with its type, dtype and order, or `Packer.pack` raises.
"""

from __future__ import annotations

import base64
import collections
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from jaxloop._checkpoint.dtypes import describe_dtype, is_native, key_dtype
from jaxloop._core.arrays import is_key, structure
from jaxloop._core.events import Event, Place, Status
from jaxloop._core.lazy import ReadOnlyDict
from jaxloop._core.times import EpochTime
from jaxloop._core.types import PyTree
from jaxloop.errors import SerializationError

_INLINE_BYTES = 1024
"""Handlers' arrays up to this size are stored in the record, and larger ones as arrays."""

_INLINE_TEXT = 2**20
"""The same for bytes, text, history and times."""

MOST_LEVELS = 64
"""How deep containers may be nested. A list that contains itself has no end."""

_SMALL = 2**63
"""Integers up to this size are JSON numbers. Python limits the digits of larger ones."""

FACTORIES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
}
"""The default factories of a defaultdict that a record can name."""

DICTS: dict[str, Any] = {
    "OrderedDict": collections.OrderedDict,
    "Counter": collections.Counter,
    "ReadOnlyDict": ReadOnlyDict,
}
_DICT_NAMES = {kind: name for name, kind in DICTS.items()}
ENUMS: dict[str, Any] = {"Event": Event, "Status": Status, "Place": Place}
_NAN = struct.pack("<d", math.nan)

_FIX = (
    "remember numbers, strings, bytes, NumPy or JAX arrays, keys, and dicts, lists and plain "
    "tuples of them, or a whole step state"
)


def is_array(leaf: Any) -> bool:
    """Returns whether a leaf has a shape and a dtype."""
    return isinstance(leaf, np.ndarray | np.generic | jax.Array)


def plain_name(name: Any) -> Any:
    """Returns a name as a plain string. Handlers and metrics may be named by members of an enum.

    Example:
        >>> plain_name(Event.STARTED)
        'started'
    """
    return name[:] if isinstance(name, str) else name


class Packer:
    """A converter of values to data for JSON.

    Args:
        trees: Gets each value that is like the step state.
        arrays: Gets each large array.
        is_step_state: Whether a value has the structure, shapes and dtypes of the step state.
    """

    def __init__(
        self,
        trees: dict[str, PyTree],
        arrays: dict[str, Any],
        is_step_state: Callable[[Any], bool],
    ) -> None:
        self._trees, self._arrays, self._is_step_state = trees, arrays, is_step_state

    def pack(self, value: Any, where: str, level: int = 0) -> Any:
        """Returns a value as data for JSON.

        Args:
            value: The value.
            where: Its path, for the error.
            level: The number of containers around it.

        Raises:
            SerializationError: It could not be read back exactly. The error says where it is.
        """
        if level > MOST_LEVELS:
            raise SerializationError(
                f"{where:.200} must be nested at most {MOST_LEVELS} levels deep, got more",
                fix="remember flatter containers, and none that contains itself",
            )
        # Subclasses, such as enums, would come back as the plain type. Each type is therefore
        # compared exactly.
        kind = type(value)
        if value is None or kind is bool or (kind is int and -_SMALL < value < _SMALL):
            return value
        if kind in _SCALARS:
            return _SCALARS[kind](self, value)
        if is_array(value):
            return self._array_like(value, where, level)
        if kind.__name__ == "Tensor" and kind.__module__ == "torch":
            return self._tensor(value, where)  # in the states of torchdata's loaders
        if self._is_step_state(value):
            return self._like(value)
        if kind is dict or kind in _DICT_NAMES or kind is collections.defaultdict:
            return self._dict(value, where, level)
        if kind in (tuple, list):
            items = [self.pack(v, f"{where}[{i}]", level + 1) for i, v in enumerate(value)]
            return {"$tuple" if kind is tuple else "$list": items}
        self._refuse(value, where)

    def array(self, array: np.ndarray[Any, Any], inline_bytes: int = _INLINE_TEXT) -> Any:
        """Returns a NumPy array as data for JSON, or a reference to it if it is large."""
        if array.nbytes <= inline_bytes:
            data = base64.b64encode(array.tobytes()).decode()
            kept = {"$array": data}
        else:
            name = f"{len(self._arrays):05d}"
            kept = {"$at": name}
            # A copy, because it is written later, and the handler may change its array before.
            if is_native(array.dtype):
                self._arrays[name] = array.copy()
                return kept
            self._arrays[name] = np.frombuffer(array.tobytes(), np.uint8)
        return {**kept, "dtype": describe_dtype(array.dtype), "shape": list(array.shape)}

    def columns(self, table: Mapping[int, Mapping[str, Any]], where: str) -> dict[str, Any]:
        """Returns ``{row: {name: value}}`` by columns, which is fast and compact for many rows."""
        columns: dict[Any, tuple[list[int], list[Any]]] = {}
        others: dict[int, dict[str, Any]] = {}
        rows = [self._row(row, where) for row in table]
        for row, values in zip(rows, table.values(), strict=True):
            for key, value in values.items():
                name = plain_name(key)
                # A column gives back NumPy scalars for one axis, and arrays for more.
                column = isinstance(value, np.generic) or (type(value) is np.ndarray and value.ndim)
                if type(name) is str and column and is_native(value.dtype):
                    one = columns.setdefault((name, value.dtype, value.shape), ([], []))
                    one[0].append(row)
                    one[1].append(value)
                else:
                    others.setdefault(row, {})[name] = value
        return {
            "rows": rows,
            "columns": [
                [name, None if mine == rows else mine, self.array(np.array(values, dtype))]
                for (name, dtype, _), (mine, values) in columns.items()
            ],
            "others": self.pack(others, where),
        }

    def _row(self, row: Any, where: str) -> int:
        if isinstance(row, int | np.integer) and row >= 0:
            return int(row)
        raise SerializationError(
            f"the keys of {where} must be numbers of epochs, got {row!r:.80}",
            fix="use whole numbers from 0",
        )

    # --- scalars ---------------------------------------------------------------------------------

    def _float(self, value: float) -> Any:
        bits = struct.pack("<d", value)
        if value == value or bits == _NAN:
            return value
        return {"$float": bits.hex()}  # a NaN with a sign or other bits that JSON has no word for

    def _text(self, value: str) -> Any:
        # JSON merges two halves of a surrogate pair into one character.
        if len(value) <= _INLINE_TEXT and (value.isascii() or _is_text(value)):
            return value
        return {"$text": self._raw(value.encode("utf-8", "surrogatepass"))}

    def _raw(self, value: bytes) -> Any:
        if len(value) <= _INLINE_TEXT:
            return base64.b64encode(value).decode()
        return self.array(np.frombuffer(value, np.uint8), 0)

    # --- arrays ----------------------------------------------------------------------------------

    def _array_like(self, value: Any, where: str, level: int) -> Any:
        if isinstance(value, jax.Array):
            return self._jax_array(value, where, level)
        if type(value) is np.ma.MaskedArray:
            return self._masked(value, where, level)
        exact = type(value) is (np.ndarray if isinstance(value, np.ndarray) else value.dtype.type)
        if exact and value.dtype == object:
            items = [
                self.pack(v, f"{where}.flat[{i}]", level + 1) for i, v in enumerate(value.flat)
            ]
            return {"$object": items, "shape": list(value.shape)}
        if not exact or describe_dtype(value.dtype) is None:
            self._refuse(value, where)
        kept = self.array(np.asarray(value), _INLINE_BYTES)
        # Format 1 has no such mark, and gives back every array without axes as a scalar.
        return {**kept, "zero_d": True} if type(value) is np.ndarray and not value.ndim else kept

    def _jax_array(self, value: jax.Array, where: str, level: int) -> Any:
        if value.is_deleted():
            raise SerializationError(
                f"{where} must be an array that exists, got one whose buffer was donated",
                fix="remember a copy of it, with jnp.copy",
            )
        if is_key(value):
            impl = str(jax.random.key_impl(value))
            if key_dtype(impl) != value.dtype:
                self._refuse(value, where)
            data = self.pack(np.asarray(jax.random.key_data(value)), where, level)
            return {"$key": data, "impl": impl}
        if value.nbytes <= _INLINE_BYTES:
            kept = self.array(np.asarray(value))
        else:
            name = f"{len(self._arrays):05d}"
            self._arrays[name], kept = value, {"$at": name}
        weak = {"weak": True} if _is_weak(value) else {}
        return {**kept, "device": True, **weak}

    def _masked(self, value: Any, where: str, level: int) -> Any:
        mask = np.ma.getmask(value)
        return {
            "$masked": self.pack(np.ma.getdata(value), where, level + 1),
            "mask": None if mask is np.ma.nomask else self.pack(mask, where, level + 1),
            "fill": self.pack(np.asarray(value.fill_value, value.dtype), where, level + 1),
            "hard": bool(value.hardmask),
        }

    def _tensor(self, value: Any, where: str) -> Any:
        try:
            array = None if value.requires_grad or value.is_conj() else value.numpy()
        except (RuntimeError, TypeError):  # on another device, or without a NumPy dtype
            array = None
        if array is None:
            self._refuse(value, where)
        return {"$torch": self.array(array, _INLINE_BYTES)}

    # --- containers ------------------------------------------------------------------------------

    def _like(self, value: PyTree) -> Any:
        name = f"like_{len(self._trees)}"
        self._trees[name] = jax.tree.map(
            lambda x: x if isinstance(x, jax.Array) else x.copy(), value
        )
        kinds = "".join(map(_kind_of_leaf, jax.tree.leaves(value)))
        return {"$like": name} if set(kinds) == {"d"} else {"$like": name, "kinds": kinds}

    def _dict(self, value: Any, where: str, level: int) -> Any:
        items = []
        for key, inner in value.items():
            at = f"{where}[{_shown(key)}]"
            items.append([self.pack(key, at, level + 1), self.pack(inner, at, level + 1)])
        kept: dict[str, Any] = {"$dict": items}
        if type(value) in _DICT_NAMES:
            kept["kind"] = _DICT_NAMES[type(value)]
        elif type(value) is collections.defaultdict:
            factory = value.default_factory
            if factory is not None and factory not in FACTORIES.values():
                raise SerializationError(
                    f"{where} must have a builtin type as its default factory, got {factory!r:.80}",
                    fix="use a factory such as int or list, or a plain dict with setdefault",
                )
            kept |= {"kind": "defaultdict", "factory": getattr(factory, "__name__", None)}
        return kept

    def _refuse(self, value: Any, where: str) -> NoReturn:
        kind, dtype = type(value), getattr(value, "dtype", None)
        of = "" if dtype is None else f" of dtype {dtype!s:.80}"
        raise SerializationError(
            f"{where} must be a value that a checkpoint can save and read back exactly, got a "
            f"{kind.__module__}.{kind.__qualname__}{of}".replace("got a builtins.", "got a "),
            fix=_FIX,
        )


_SCALARS: dict[type, Callable[[Packer, Any], Any]] = {
    int: lambda packer, value: {"$int": hex(value)},
    float: Packer._float,
    str: Packer._text,
    complex: lambda packer, value: {
        "$complex": [packer._float(value.real), packer._float(value.imag)]
    },
    bytes: lambda packer, value: {"$bytes": packer._raw(value)},
    # A slice, because `str` drops zeros at the end.
    np.str_: lambda packer, value: {"$numpy": packer._text(value[:])},
    np.bytes_: lambda packer, value: {"$numpy": {"$bytes": packer._raw(value[:])}},
    EpochTime: lambda packer, value: {"$time": [packer._float(part) for part in value.parts]},
    **{
        kind: lambda packer, value: {"$enum": value.value, "kind": type(value).__name__}
        for kind in ENUMS.values()
    },
}


def _shown(key: Any) -> str:
    try:
        return f"{key!r:.80}"
    except Exception:  # a repr may be anyone's code, and Python limits the digits of a number
        return f"a {type(key).__name__}"


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_weak(array: jax.Array) -> bool:
    return bool(getattr(array, "weak_type", False))  # keys have no such attribute


def _kind_of_leaf(leaf: Any) -> str:
    """Returns how a leaf comes back: on the device, with a weak type, as an array or a scalar."""
    if isinstance(leaf, jax.Array):
        return "w" if _is_weak(leaf) else "d"
    return "a" if isinstance(leaf, np.ndarray) else "s"


def step_state_test(
    step_state: PyTree, describe: Callable[[PyTree], list[list[Any]]]
) -> Callable[[Any], bool]:
    """Returns a function that says whether a value has the structure and leaves of a step state."""
    mine, leaves = structure(step_state), describe(step_state)

    def is_step_state(value: Any) -> bool:
        try:
            if not leaves or structure(value) != mine or not _is_sorted(value):
                return False
        except (TypeError, ValueError, RecursionError, SystemError):
            return False  # a dict whose keys have no order, or a list that contains itself
        return all(map(_is_exact, jax.tree.leaves(value))) and describe(value) == leaves

    return is_step_state


def _is_exact(leaf: Any) -> bool:
    """Returns whether a leaf is an array, and not of a subclass."""
    if isinstance(leaf, np.generic):
        return type(leaf) is leaf.dtype.type
    return isinstance(leaf, jax.Array) or type(leaf) is np.ndarray


def _is_sorted(value: Any) -> bool:
    """Returns whether the keys of dicts are in the order in which JAX gives them back."""
    if type(value) is dict:
        keys = list(value)
        return keys == sorted(keys) and all(map(_is_sorted, value.values()))
    return not isinstance(value, list | tuple) or all(map(_is_sorted, value))
