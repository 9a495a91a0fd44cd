"""The safetensors format: a header of JSON, and the bytes of the arrays.

    write_arrays(path, {"kernel": array}, metadata={})
    with ArrayFile(path) as file:
        file.entries["kernel"].shape
        file.read("kernel")

Invariant: at any moment, the path has the whole old file or the whole new one. Whoever wrote a
file, what is read of it is checked first, and takes no more memory than the file is long.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxloop.errors import CheckpointError, DamagedError, SerializationError

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
"""The dtypes that the format has, and how it writes them."""
_DTYPES = {code: name for name, code in _CODES.items()}

_MOST_HEADER_BYTES = 100_000_000
"""The limit of the format's own library."""
_METADATA = "__metadata__"


class Entry(NamedTuple):
    """An array in a file.

    Attributes:
        code: How the format writes the dtype.
        shape: The shape.
        begin: The place of its first byte, after the header.
        end: The place after its last byte.
    """

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The dtype, or None if this version does not know it."""
        return jnp.dtype(_DTYPES[self.code]) if self.code in _DTYPES else None

    def __str__(self) -> str:
        return f"{_DTYPES.get(self.code, self.code)}{list(self.shape)}"


class Planned(NamedTuple):
    """An array that will be written.

    Attributes:
        shape: Its shape.
        dtype: Its dtype, one for which `has_code` is true.
        read: Returns it as a NumPy array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray[Any, Any]]


def has_code(dtype: np.dtype[Any]) -> bool:
    """Returns whether the format has a dtype."""
    return dtype.name in _CODES


def known_dtypes() -> str:
    """Returns the names of the dtypes that the format has, for an error."""
    return ", ".join(_CODES)


def write_arrays(path: str, arrays: Mapping[str, Planned], metadata: Mapping[str, str]) -> None:
    """Writes arrays to a file, one after the other, and then gives it its name.

    Raises:
        CheckpointError: The file cannot be written.
    """
    # The largest dtypes first, so that each array begins at a multiple of its own size.
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    begin = 0
    for name in names:
        one = arrays[name]
        end = begin + math.prod(one.shape) * one.dtype.itemsize
        header[name] = {
            "dtype": _CODES[one.dtype.name],
            "shape": list(one.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(_bytes_of(arrays[name].read()))


def _bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.asarray(little, order="C").reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """Opens a new file that takes the place of ``path`` when all of it is on the disk."""
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
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(folder)
    except OSError as error:
        raise CheckpointError(
            f"save_weights: {target} must be a file that can be written, got "
            f"{type(error).__name__}: {error}",
            fix="pass a path in a folder that you may write to, with enough space",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def _sync_folder(folder: str) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
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
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115  closed by `__exit__`
        except OSError as error:
            raise CheckpointError(
                f"load_weights: path must be a file that can be read, got {path} "
                f"({type(error).__name__})",
                fix="pass the path of a file that save_weights or safetensors wrote",
            ) from error
        try:
            self.entries, self.metadata = self._header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Returns an array, which shares no memory with anything.

        Raises:
            DamagedError: The file became shorter.
            SerializationError: This version does not know the dtype.
        """
        entry = self.entries[name]
        if entry.dtype is None:
            raise SerializationError(
                f"load_weights: {name!r} must have a dtype of {known_dtypes()}, got {entry.code}",
                fix="convert it with the library that wrote it",
            )
        flat = np.empty(entry.end - entry.begin, np.uint8)
        self._file.seek(self._start + entry.begin)
        if self._file.readinto(flat.data) != flat.size:
            raise self._damaged("the file became shorter")
        dtype = entry.dtype.newbyteorder("<") if entry.dtype.itemsize > 1 else entry.dtype
        return flat.view(dtype).astype(entry.dtype, copy=False).reshape(entry.shape)

    def _header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        first = self._file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(_MOST_HEADER_BYTES, size - 8):
            raise self._damaged("no header")
        self._start = 8 + length
        try:
            header = json.loads(self._file.read(length).decode(), object_pairs_hook=_without_twins)
            metadata = header.pop(_METADATA, {})
            entries = {name: _entry(one) for name, one in header.items()}
            strings = {str(name): str(text) for name, text in metadata.items()}
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise self._damaged(f"a header that cannot be read ({error})") from error
        place = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
            known = entry.dtype
            expected = entry.end - entry.begin
            if known is not None:
                expected = math.prod(entry.shape) * known.itemsize
            if entry.begin != place or entry.end - entry.begin != expected:
                raise self._damaged(f"{name!r}, {entry}, at the bytes {entry.begin} to {entry.end}")
            place = entry.end
        if place != size - self._start:
            raise self._damaged(f"{size - self._start} bytes of arrays in place of {place}")
        return entries, strings

    def _damaged(self, found: str) -> DamagedError:
        return DamagedError(
            f"load_weights: {self._path} must be a whole safetensors file, got {found}",
            fix="use another copy",
        )


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name comes twice")
    return dict(pairs)


def _entry(described: Any) -> Entry:
    shape, (begin, end) = described["shape"], described["data_offsets"]
    numbers = [*shape, begin, end]
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or end < begin:
        raise ValueError(f"a shape or an offset is {numbers}")
    return Entry(str(described["dtype"]), tuple(shape), begin, end)
