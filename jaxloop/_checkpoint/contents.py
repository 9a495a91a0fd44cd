"""What the record of a checkpoint says, read without its large arrays and without the user's code.

    state = state_of_record(entry)
    state.status, state.history             # but its step state is empty

Reading changes nothing in the folder. Use `jaxloop._checkpoint.reader` to read the whole state.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxloop._checkpoint.dtypes import leaf_dtype
from jaxloop._checkpoint.layout import Entry, read
from jaxloop._checkpoint.orbax_io import restore_trees
from jaxloop._checkpoint.record import CODECS, FORMAT, numbered
from jaxloop._checkpoint.unpacking import MALFORMED, Unpacker
from jaxloop._core.state import State, saved_fields
from jaxloop.errors import SerializationError, first_line

_OTHER_FIELDS = ("handler_state", "position")
"""What handlers and the data remember may need arrays, and is of no use without their code."""


def state_of_record(entry: Entry) -> State[Any] | None:
    """Returns the state in a checkpoint without its trees of arrays, its handlers' and its data's.

    A field has its default if the record lacks it or if it cannot be read here.

    Args:
        entry: A checkpoint.

    Returns:
        A `State`, or None if the record is damaged or of a later jaxloop. `damage` says which.
    """
    record = entry.record
    if record is None or record["format"] > FORMAT:
        return None
    unpacker = Unpacker({"arrays": _arrays(entry.folder, record)})
    fields: dict[str, Any] = {}
    for key, field in saved_fields().items():
        if key not in record or key in _OTHER_FIELDS:
            continue
        try:
            value = CODECS[key].unpack(record[key], unpacker) if key in CODECS else record[key]
        except (*MALFORMED, RecursionError):
            continue  # `SerializationError` is a ValueError
        fields[field] = value
    return State(**fields)


def damage(entry: Entry) -> str:
    """Returns what is wrong with a checkpoint, as far as its record and its folders tell.

    It does not read the arrays.

    Returns:
        A phrase, or an empty string.
    """
    if entry.record is None:
        return entry.problem
    if entry.record["format"] > FORMAT:
        return f"a later jaxloop wrote it, in format {entry.record['format']}"
    missing = [
        name
        for name, leaves in entry.record["leaves"].items()
        if leaves and not (entry.folder / name).is_dir()
    ]
    if not missing or has_changed(entry):
        return ""
    return f"its arrays are missing: {', '.join(missing)}"


def leaves_of(entry: Entry) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns ``{path: (dtype, shape)}`` of the leaves of the step state, without reading them."""
    if entry.record is None or entry.record["format"] > FORMAT:
        return {}
    leaves = entry.record["leaves"]["step_state"]
    return {path: (dtype, tuple(shape)) for path, dtype, shape in leaves}


def _arrays(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays that the fields refer to. Only those of very long runs need any."""
    used = [value for key, value in record.items() if key in CODECS and key not in _OTHER_FIELDS]
    if not any(map(_refers, used)):
        return {}
    targets = [
        np.broadcast_to(np.zeros((), leaf_dtype(dtype)), shape)
        for _, dtype, shape in record["leaves"]["arrays"]
    ]
    try:
        arrays: dict[str, Any] = restore_trees(folder, {"arrays": numbered(targets)})["arrays"]
    except Exception as error:  # Orbax raises a bare Exception for damage
        raise SerializationError(
            f"the arrays of {folder} must be readable, got: {first_line(error)}",
            fix="run `jaxloop verify` on the folder",
        ) from error
    return arrays


def _refers(kept: Any) -> bool:
    """Returns whether a value in a record refers to an array outside of it."""
    parts = [kept]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if "$at" in part:
                return True
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return False


def has_changed(entry: Entry) -> bool:
    """Returns whether a checkpoint was deleted or replaced since ``entry`` was read.

    The run that writes the folder may do so at any time, and what was read is then no damage.
    """
    return not entry.folder.exists() or _identity(read(entry.folder)) != _identity(entry)


def _identity(entry: Entry) -> tuple[str | None, str]:
    # Not the whole records, which may have NaN.
    return None if entry.record is None else entry.record["sha256"], entry.problem


def size_bytes(folder: Path) -> int:
    """Returns the sum of the sizes of the files in a folder. Files that vanish count as nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total
