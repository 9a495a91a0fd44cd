"""Finds the checkpoints that a path on the command line names, and says what they hold.

    folder = open_folder("runs/digits")
    [checkpoint.step for checkpoint in folder.checkpoints]

Nothing in a folder is changed, and a training run may write to it at the same time.
"""

from __future__ import annotations

import dataclasses
import os
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxloop._checkpoint.contents import damage, size_bytes, state_of_record
from jaxloop._checkpoint.layout import Entry, entries, inaccessible, read, unfinished
from jaxloop._checkpoint.lock import Owner, owner_of
from jaxloop._checkpoint.names import UNFINISHED, check_path
from jaxloop._cli.console import text_of_seconds
from jaxloop._core.state import State
from jaxloop.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a folder."""

    entry: Entry

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.entry.folder.name

    @cached_property
    def state(self) -> State[Any] | None:
        """What its record says, or None if that cannot be read."""
        return state_of_record(self.entry)

    @cached_property
    def problem(self) -> str:
        """What is wrong with it, as far as one can tell without its arrays."""
        return damage(self.entry)

    @property
    def saved_at(self) -> float | None:
        """The Unix time at which it was complete, or None if it has vanished."""
        for file in ("meta/metadata", "."):
            try:
                return (self.entry.folder / file).stat().st_mtime
            except OSError:
                continue
        return None

    @property
    def age_s(self) -> float | None:
        """The seconds since it was saved."""
        saved_at = self.saved_at
        return None if saved_at is None else time.time() - saved_at

    @property
    def size_bytes(self) -> int:
        """The size of its files."""
        return size_bytes(self.entry.folder)


@dataclasses.dataclass(frozen=True)
class Folder:
    """The checkpoints of a folder at one instant.

    Attributes:
        path: The folder.
        checkpoints: Those that are complete, the newest first. Damaged ones come first.
        unfinished: The names of those that are being written, or were when their run ended.
        owner: The process that has the lock, or None.
    """

    path: Path
    checkpoints: tuple[Checkpoint, ...]
    unfinished: tuple[str, ...]
    owner: Owner | None

    @property
    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose record is good."""
        return next((one for one in self.checkpoints if one.state), None)

    @property
    def best(self) -> Checkpoint | None:
        """The checkpoint that ``jl.restore(path, "best")`` reads."""
        good = (one for one in self.checkpoints if not one.problem)
        return next((one for one in good if one.entry.value is not None), None)

    @property
    def writer(self) -> str:
        """A sentence about who writes here."""
        if self.owner is None:
            return "no process writes here now"
        since = f" since {self.owner.since}" if self.owner.since else ""
        if self.owner.is_running:
            return f"{self.owner.process} writes here{since}"
        if self.owner.is_running is False:
            return f"{self.owner.process} wrote here{since}, and died"
        touched = text_of_seconds(time.time() - self.owner.touched_at)
        return f"{self.owner.process} may write here{since}; it touched its lock {touched} ago"


def open_folder(path: str) -> Folder:
    """Returns the checkpoints that a path names.

    Args:
        path: A folder of checkpoints, one checkpoint, or a folder with one folder of checkpoints
            directly in it.

    Raises:
        CheckpointError: The path does not exist, has no checkpoints, or cannot be read.
    """
    given = Path(check_path("PATH", path)).absolute()
    if not given.is_dir():
        raise CheckpointError(
            f"PATH must be a folder of checkpoints, got {given}, which "
            + ("is a file" if given.exists() else "does not exist"),
            fix="pass the path= of Loop.checkpoint, or the folder above it",
        )
    if (given / "meta").is_dir() and (given / "_CHECKPOINT_METADATA").exists():
        only = Checkpoint(read(given))
        return Folder(given.parent, (only,), (), owner_of(given.parent))
    found = find_folder(given)
    if found is None:
        raise CheckpointError(
            f"PATH must be a folder of checkpoints, got {given}, which has none",
            fix="pass the path= of Loop.checkpoint",
        )
    return found


def find_folder(path: Path) -> Folder | None:
    """Returns the checkpoints in a folder or in the one folder of them inside it, or None.

    Raises:
        CheckpointError: The path is no folder, it cannot be read, or it has several such folders.
    """
    found = read_folder(path)
    if _is_used(found):
        return found
    inside = [one for one in map(read_folder, _folders_in(path)) if _is_used(one)]
    if len(inside) > 1:
        names = ", ".join(sorted(one.path.name for one in inside)[:5])
        raise CheckpointError(
            f"PATH must be a folder of checkpoints, got {path}, which has {len(inside)} folders of "
            "them",
            fix=f"pass one of them: {names}",
        )
    return inside[0] if inside else None


def read_folder(path: Path) -> Folder:
    """Returns the checkpoints in a folder. It may have none."""
    owner = owner_of(path)  # read first: if a run has ended by now, its last checkpoint is there
    # A run that writes here may have deleted or replaced some since their names were read.
    known = [one if one.record else read(one.folder) for one in entries(path)]
    found = tuple(Checkpoint(one) for one in known if one.record or one.folder.exists())
    names = tuple(one.name.split(UNFINISHED)[0] for one in unfinished(path))
    return Folder(path, found, names, owner)


def _is_used(folder: Folder) -> bool:
    return bool(folder.checkpoints or folder.unfinished or folder.owner)


def _folders_in(path: Path) -> list[Path]:
    try:
        return [one for one in sorted(path.iterdir()) if one.is_dir() and _is_readable(one)]
    except OSError as error:
        raise inaccessible(path, error) from error


def _is_readable(path: Path) -> bool:
    """Returns whether a folder can be read. One that cannot is none of the run's."""
    return os.access(path, os.R_OK | os.X_OK)
