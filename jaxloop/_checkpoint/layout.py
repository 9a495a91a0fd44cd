"""The layout of a folder of checkpoints, and what a killed run may have left there.

    for entry in entries(Path("runs/a")):       # the newest first
        entry.step, entry.problem

A checkpoint is a folder ``<path>/<name>/`` in Orbax's layout: the record in ``meta``, and each tree
of arrays beside it. It gets its name when it is complete, and it loses it before anything of it is
deleted: whatever has a name is whole, unless the disk itself damaged it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from jaxloop._checkpoint.record import checksum

REPLACED, DELETED, UNFINISHED = ".replaced", ".deleted", ".orbax-checkpoint-tmp"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A checkpoint in a folder: its record, or what is wrong with it."""

    folder: Path
    record: dict[str, Any] | None
    problem: str = ""

    @property
    def order(self) -> int:
        """When it was saved: larger is later; 0 of a damaged one."""
        return self.record["order"] if self.record is not None else 0

    @property
    def step(self) -> int:
        """The state's step; -1 of a damaged one."""
        return self.record["step"] if self.record is not None else -1

    @property
    def value(self) -> float | None:
        """What made it the best when it was saved."""
        return None if self.record is None else self.record["value"]


def read(folder: Path) -> Entry:
    """The checkpoint in a folder of its own."""
    try:
        record = json.loads((folder / "meta" / "metadata").read_text())
    except (OSError, ValueError) as error:
        return Entry(folder, None, f"its record cannot be read: {error}")
    if not isinstance(record, dict) or record.get("sha256") != checksum(record):
        return Entry(folder, None, "its record is altered: the checksum differs")
    return Entry(folder, record)


def entries(path: Path) -> list[Entry]:
    """The checkpoints in a folder, the newest first; before them those whose age is unknown."""
    if not path.is_dir():
        return []
    found = []
    for folder in path.iterdir():
        name = folder.name
        if UNFINISHED in name or name.endswith(DELETED):
            continue
        # What is being replaced counts for as long as the new one is not there.
        if name.endswith(REPLACED) and (path / name.removesuffix(REPLACED)).exists():
            continue
        if (folder / "meta").is_dir() or (folder / "_CHECKPOINT_METADATA").exists():
            found.append(read(folder))
    return sorted(found, key=lambda entry: (entry.record is not None, -entry.order))


def delete(folder: Path) -> None:
    """Deletes a checkpoint so that it is never there in part."""
    gone = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}{DELETED}")
    with contextlib.suppress(OSError):
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def tidy(path: Path) -> list[Path]:
    """Undoes what a killed run left; returns the checkpoints that were being written.

    Raises nothing: a folder that cannot be written may still be read.
    """
    unfinished = list(path.glob(f"*{UNFINISHED}*"))
    with contextlib.suppress(OSError):
        for old in path.glob("*" + REPLACED):
            target = path / old.name.removesuffix(REPLACED)
            if target.exists():
                delete(old)
            else:
                os.rename(old, target)
    for left in (*unfinished, *path.glob("*" + DELETED)):
        shutil.rmtree(left, ignore_errors=True)
    return unfinished
