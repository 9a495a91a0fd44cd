"""Files of arrays, by the safetensors library.

    write_arrays(path, {"kernel": array}, metadata={})
    with ArrayFile(path) as file:
        file.entries["kernel"].shape
        file.read("kernel")

Invariant: at any moment, the path has the whole old file or the whole new one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxloop._core.extras import import_extra
from jaxloop.errors import (
    CheckpointError,
    DamagedError,
    MissingExtraError,
    SerializationError,
)

_CODES = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
"""The dtypes that the library writes, and how a file names them."""
_DTYPES = {code: name for name, code in _CODES.items()}

_OLDEST = (0, 8)
"""Older versions of the library lack dtypes, and crash if a file becomes shorter."""


class Entry(NamedTuple):
    """An array in a file.

    Attributes:
        code: How the file names its dtype.
        shape: Its shape.
    """

    code: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The dtype, or None if NumPy has none such."""
        return jnp.dtype(_DTYPES[self.code]) if self.code in _DTYPES else None

    def __str__(self) -> str:
        return f"{_DTYPES.get(self.code, self.code)}{list(self.shape)}"


def has_code(dtype: np.dtype[Any]) -> bool:
    """Returns whether the format has a dtype."""
    return dtype.name in _CODES


def known_dtypes() -> str:
    """Returns the names of the dtypes that the format has, for an error."""
    return ", ".join(_CODES)


def _library(what: str) -> Any:
    library = import_extra("safetensors", what=what, extra="safetensors")
    if tuple(map(int, library.__version__.split(".")[:2])) < _OLDEST:
        newer = f"safetensors {'.'.join(map(str, _OLDEST))} or newer"
        raise MissingExtraError(what, newer, "safetensors")
    return library


def write_arrays(
    path: str, arrays: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str]
) -> None:
    """Writes arrays to a file, and then gives it its name.

    Raises:
        CheckpointError: The file cannot be written.
        MissingExtraError: safetensors is not installed, or is too old.
    """
    failure = _library("save_weights").SafetensorError
    numpy_api = import_extra("safetensors.numpy", what="save_weights", extra="safetensors")
    # The library takes the memory as it is, whatever the strides say.
    in_order = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with _replacing(path) as temporary:
        try:
            numpy_api.save_file(in_order, temporary, metadata=dict(metadata) or None)
        except failure as error:
            raise OSError(str(error)) from error  # of dtypes and names, all are checked


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
    """Gives the name of a file that takes the place of ``path`` when all of it is on the disk."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if os.path.isdir(target):
        raise CheckpointError(
            f"save_weights: path must be a file, got the folder {target}",
            fix="pass the path of a file, such as 'model.safetensors'",
        )
    temporary = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield temporary
        os.chmod(temporary, mode)  # the library makes a file that nobody else may read
        _sync(temporary)
        os.replace(temporary, target)
        with contextlib.suppress(OSError):  # some file systems cannot
            _sync(folder)
    except OSError as error:
        raise CheckpointError(
            f"save_weights: {target} must be a file that can be written, got "
            f"{type(error).__name__}: {error}",
            fix="pass a path in a folder that you may write to, with enough space",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ArrayFile:
    """An open file of arrays. Use it as a context manager.

    Args:
        path: The path of the file.

    Attributes:
        entries: The arrays by name, in the order of the file.
        metadata: The strings that were saved beside them.

    Raises:
        CheckpointError: The file cannot be read.
        DamagedError: It is no safetensors file, or a damaged one.
        MissingExtraError: safetensors is not installed, or is too old.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._library = _library("load_weights")
        with self._readable():
            # Not "mmap": the process would die if the file became shorter.
            self._file = self._library.safe_open(path, framework="np", backend="pread")
            self._file.__enter__()
        self.metadata: dict[str, str] = self._file.metadata() or {}
        slices = {name: self._file.get_slice(name) for name in self._file.offset_keys()}
        self.entries = {
            name: Entry(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()
        }
        self._raw: dict[str, bytearray] | None = None
        # The library cannot make float8 for NumPy, one array at a time. All arrays are taken from
        # one reading, because the file may be replaced.
        if any(one.code.startswith("F8_") for one in self.entries.values()):
            with self._readable(), open(path, "rb") as file:
                found = self._library.deserialize(file.read())
            self.entries = {name: Entry(one["dtype"], tuple(one["shape"])) for name, one in found}
            self._raw = {name: one["data"] for name, one in found}

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Returns an array, which shares no memory with the file.

        Raises:
            DamagedError: The file became shorter.
            SerializationError: NumPy has no such dtype.
        """
        entry = self.entries[name]
        if entry.dtype is None:
            raise SerializationError(
                f"load_weights: {name!r} must have a dtype of {known_dtypes()}, got {entry.code}",
                fix="convert it with the library that wrote it",
            )
        if self._raw is not None:
            return np.frombuffer(self._raw[name], entry.dtype).reshape(entry.shape)
        with self._readable():
            array: np.ndarray[Any, Any] = self._file.get_tensor(name)
        return array

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except self._library.SafetensorError as error:
            raise DamagedError(
                f"load_weights: {self._path} must be a whole safetensors file, got: {error}",
                fix="use another copy",
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"load_weights: path must be a file that can be read, got {self._path} "
                f"({type(error).__name__})",
                fix="pass the path of a file that save_weights or safetensors wrote",
            ) from error
