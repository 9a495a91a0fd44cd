"""The schema of a record: which fields it has, and what each may be.

    check_record(record, coded=_CODECS)

A stranger may have written the record, with a checksum that is right. After this check, each field
has its type, no size is negative, and no name leads out of the folder. The fields that have a codec
are checked by the codec.
"""

from __future__ import annotations

import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

from jaxloop._checkpoint.dtypes import is_native, leaf_dtype
from jaxloop._checkpoint.unpacking import is_shape
from jaxloop._core.state import State, saved_fields
from jaxloop.errors import DamagedError, SerializationError

NUMBERED = ("accumulators", "arrays")
"""The trees of numbered leaves, which do not have the structure of the step state."""

MOST_BYTES = 2**26
"""The maximum size of a record. Arrays are not in it."""

_MOST_VALUES = 2**22
"""The maximum number of values in a record. Each takes up to 64 bytes of memory."""

_DIGESTS_SINCE = 2
"""The format in which records of a folder got digests of the arrays."""

_TREE = re.compile(r"step_state|accumulators|arrays|like_[0-9]{1,6}")
_MOST = 2**63


def is_too_large(text: bytes) -> bool:
    """Returns whether the text of a record would take too much memory."""
    return len(text) > MOST_BYTES or sum(map(text.count, (b",", b"[", b"{"))) > _MOST_VALUES


def too_large(size: int) -> str:
    """Returns what is wrong with a record of such a size, for errors."""
    return (
        f"a record must have at most {MOST_BYTES} bytes and {_MOST_VALUES} values, got more "
        f"(in {size} bytes)"
    )


def check_size(text: bytes) -> None:
    """Raises if a record is so large that it could not be read again.

    Raises:
        SerializationError: It is too large. The error says what to do.
    """
    if is_too_large(text):
        raise SerializationError(
            too_large(len(text)),
            fix="remember long lists of numbers as NumPy arrays, which are saved beside the record",
        )


def is_whole(value: Any) -> bool:
    """Returns whether data from JSON are a count."""
    return type(value) is int and 0 <= value < _MOST


def matches(value: Any, hint: Any) -> bool:
    """Returns whether a value has the type that a field declares. Numbers are finite and from 0.

    Example:
        >>> matches(3, int | None), matches(-1, int | None), matches("3", int | None)
        (True, False, False)
    """
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return type(value) is str and value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, one) for one in typing.get_args(hint))
    if hint is int:
        return is_whole(value)
    if hint is float:
        return type(value) in (int, float) and 0 <= value < math.inf
    return value is None if hint in (None, types.NoneType) else type(value) is hint


@cache
def hints_of(cls: type[Any]) -> dict[str, Any]:
    """Returns the declared types of the fields of `State` or of another class."""
    return typing.get_type_hints(cls)


def check_record(record: Any, coded: Collection[str]) -> None:
    """Raises if a record of a known format lacks a field, or a field has a wrong type.

    Args:
        record: The record.
        coded: The fields that have a codec.

    Raises:
        DamagedError: The record is malformed. The error names the field.
    """
    check_format_field(record)
    required = saved_fields(record["format"])
    for key, field in saved_fields().items():
        if key not in record:
            if key in required:
                raise malformed(key, "nothing")
        elif key not in coded and not matches(record[key], hints_of(State)[field]):
            raise malformed(key, record[key])
    if "leaves" not in record:
        raise malformed("leaves", "nothing")
    for key, check in _CHECKS.items():
        if key in record and not check(record[key]):
            raise malformed(key, record[key])


def check_format_field(record: Any) -> None:
    """Raises if a record has no version.

    Raises:
        DamagedError: It is not a dict, or its format is not a version.
    """
    if not isinstance(record, dict):
        raise DamagedError(f"a record must be a dict, got {reprlib.repr(record)}", fix=_FIX)
    if not is_whole(record.get("format")) or not record["format"]:
        raise malformed("format", record.get("format"))


def check_folder_fields(record: dict[str, Any]) -> None:
    """Raises if a record lacks what a folder needs to sort its checkpoints.

    Raises:
        DamagedError: The order, the step or the value is missing or has a wrong type.
    """
    for key in ("order", "step", "value"):
        check = _CHECKS.get(key, is_whole)
        if key not in record or not check(record[key]):
            raise malformed(key, record.get(key, "nothing"))


def check_digested(record: dict[str, Any]) -> None:
    """Raises if a record of a known format lacks the digests of its arrays.

    Raises:
        DamagedError: A tree has none.
    """
    digests = record.get("digests", {})
    if record["format"] >= _DIGESTS_SINCE and not record["leaves"].keys() <= digests.keys():
        raise malformed("digests", digests)


_FIX = "use another copy"


def malformed(key: str, value: Any) -> DamagedError:
    """Returns the error for a field of a record that jaxloop never writes."""
    return DamagedError(
        f"a record must have its field {key!r} as jaxloop writes it, got {reprlib.repr(value)}",
        fix=_FIX,
    )


def _are_leaves(value: Any) -> bool:
    if not isinstance(value, dict) or not {"step_state", *NUMBERED} <= value.keys():
        return False
    return all(
        _TREE.fullmatch(name) is not None
        and isinstance(leaves, list)
        and all(map(_is_leaf, leaves))
        and (name not in NUMBERED or _are_numbered(name, leaves))
        for name, leaves in value.items()
    )


def _is_leaf(leaf: Any) -> bool:
    return (
        isinstance(leaf, list)
        and len(leaf) == 3
        and type(leaf[0]) is str
        and type(leaf[1]) is str
        and is_shape(leaf[2])
    )


def _are_numbered(name: str, leaves: list[Any]) -> bool:
    for i, (path, dtype, _) in enumerate(leaves):
        try:
            known = leaf_dtype(dtype)
        except SerializationError:
            return False
        if path != f"['{i:05d}']" or (name == "arrays" and not is_native(known)):
            return False
    return True


def _are_empty_arrays(value: Any) -> bool:
    return isinstance(value, list) and all(_is_leaf(one) and 0 in one[2] for one in value)


def is_list_of_strings(value: Any) -> bool:
    """Returns whether data from JSON are a list of strings."""
    return isinstance(value, list) and all(type(name) is str for name in value)


def _is_digest(leaf: Any) -> bool:
    return is_list_of_strings(leaf) and len(leaf) == 2


def _are_digests(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(leaves, list) and all(map(_is_digest, leaves)) for leaves in value.values()
    )


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "leaves": _are_leaves,
    "order": is_whole,
    "value": lambda value: value is None or type(value) in (int, float),
    "empty": _are_empty_arrays,
    "sha256": lambda value: type(value) is str,
    "own": lambda value: value is True,
    "own_bytes": is_whole,
    "trees": is_list_of_strings,
    "empty_nodes": is_list_of_strings,
    "saved_by": is_list_of_strings,
    "digests": _are_digests,
}
