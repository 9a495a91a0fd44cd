"""The layout of a folder of checkpoints, and the cleanup after a killed run.

    for entry in entries(Path("runs/a")):       # the newest first
        entry.step, entry.problem

A checkpoint is a folder ``<path>/<name>/`` in Orbax's layout: the record in ``meta``, and each tree
of arrays beside it. It gets its name when it is complete, and is renamed before any part of it is
deleted. A folder with its own name is therefore complete, unless the disk damaged it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from jaxloop._checkpoint.parsing import load
from jaxloop.errors import DamagedError, first_line

REPLACED, DELETED, UNFINISHED = ".replaced", ".deleted", ".orbax-checkpoint-tmp"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A checkpoint in a folder: its record, or the problem with it."""

    folder: Path
    record: dict[str, Any] | None
    problem: str = ""

    @property
    def order(self) -> int:
        """The order of saving: larger is later, and 0 means damaged."""
        return self.record["order"] if self.record is not None else 0

    @property
    def step(self) -> int:
        """The step of the state, or -1 if the checkpoint is damaged."""
        return self.record["step"] if self.record is not None else -1

    @property
    def value(self) -> float | None:
        """The value that made it the best when it was saved."""
        return None if self.record is None else self.record["value"]


def read(folder: Path) -> Entry:
    """Returns the checkpoint in a folder."""
    try:
        return Entry(folder, load(folder / "meta" / "metadata"))
    except OSError as error:
        return Entry(folder, None, f"its record cannot be read: {error}")
    except DamagedError as error:
        return Entry(folder, None, first_line(error))


def entries(path: Path) -> list[Entry]:
    """Returns the checkpoints in a folder: those of unknown age, then the others, newest first."""
    if not path.is_dir():
        return []
    found = []
    for folder in path.iterdir():
        name = folder.name
        if UNFINISHED in name or name.endswith(DELETED):
            continue
        # A checkpoint that is being replaced counts until the new one exists.
        if name.endswith(REPLACED) and (path / name.removesuffix(REPLACED)).exists():
            continue
        if (folder / "meta").is_dir() or (folder / "_CHECKPOINT_METADATA").exists():
            found.append(read(folder))
    return sorted(found, key=lambda entry: (entry.record is not None, -entry.order))


def delete(folder: Path) -> None:
    """Deletes a checkpoint. A partly deleted checkpoint never counts as complete."""
    gone = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}{DELETED}")
    with contextlib.suppress(OSError):
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def tidy(path: Path) -> list[Path]:
    """Cleans up after a killed run, and returns the checkpoints that it was writing.

    This never raises, because a folder that is not writable may still be readable.
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
