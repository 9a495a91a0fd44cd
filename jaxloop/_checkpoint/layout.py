"""The layout of a folder of checkpoints.

    for entry in entries(Path("runs/a")):       # the newest first
        entry.step, entry.problem

A checkpoint is a folder ``<path>/<name>/`` in Orbax's layout: the record in ``meta``, and each tree
of arrays beside it. It gets its name when it is complete, and is renamed before any part of it is
deleted. A folder with its own name is therefore complete, unless the disk damaged it.

Only `delete` and `tidy` change anything. Only the run that owns the folder's lock calls them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import stat
import uuid
from pathlib import Path
from typing import Any

from jaxloop._checkpoint.names import DELETED, REPLACED, UNFINISHED
from jaxloop._checkpoint.parsing import load
from jaxloop.errors import CheckpointError, DamagedError, first_line


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

    @property
    def run_id(self) -> str | None:
        """The run that saved it, or None if that is unknown."""
        return None if self.record is None else self.record.get("run_id")

    @property
    def saved_by(self) -> list[str]:
        """The names of the triggers that asked for it."""
        return [] if self.record is None else self.record.get("saved_by", [])


def read(folder: Path) -> Entry:
    """Returns the checkpoint in a folder.

    Raises:
        CheckpointError: The record exists, and the system does not allow to read it.
    """
    file = folder / "meta" / "metadata"
    try:
        return Entry(folder, load(file))
    except (FileNotFoundError, NotADirectoryError) as error:
        return Entry(folder, None, f"its record is missing: {error}")
    except DamagedError as error:
        return Entry(folder, None, first_line(error))
    except OSError as error:
        raise inaccessible(folder, error) from error


def entries(path: Path) -> list[Entry]:
    """Returns the checkpoints in a folder: those of unknown age, then the others, newest first.

    A folder that does not exist has none.

    Raises:
        CheckpointError: The path is not a folder, or the system does not allow to read it.
    """
    found = []
    for name in _listed(path):
        folder = path / name
        if UNFINISHED in name or name.endswith(DELETED):
            continue
        # A checkpoint that is being replaced counts until the new one exists.
        if name.endswith(REPLACED) and (path / name.removesuffix(REPLACED)).exists():
            continue
        if _is_folder(folder / "meta") or _is_file(folder / "_CHECKPOINT_METADATA"):
            found.append(read(folder))
    return sorted(found, key=lambda entry: (entry.record is not None, -entry.order))


def unfinished(path: Path) -> list[Path]:
    """Returns the checkpoints that are being written, or whose run ended before they were complete.

    Raises:
        CheckpointError: As `entries`.
    """
    return [path / name for name in _listed(path) if UNFINISHED in name]


def check_readable(folder: Path) -> None:
    """Raises if the system does not allow to read one of the files of a checkpoint.

    TensorStore's errors do not tell a file that may not be read from one that is damaged.

    Raises:
        CheckpointError: A file or a folder cannot be read.
        DamagedError: Something in the folder is neither a file nor a folder.
    """

    def fail(error: OSError) -> None:
        raise error

    try:
        for root, _, files in os.walk(folder, onerror=fail):
            for name in files:
                file = os.path.join(root, name)
                if not stat.S_ISREG(os.stat(file).st_mode):  # reading a pipe would never end
                    raise DamagedError(f"{file} is not a file", fix="use another checkpoint")
                with open(file, "rb") as opened:
                    opened.read(1)
    except FileNotFoundError:
        return  # damage, or the run that writes here has just deleted it
    except OSError as error:
        raise inaccessible(folder, error) from error


def inaccessible(path: Path, error: OSError | str) -> CheckpointError:
    """Returns the error for a folder that cannot be read."""
    return CheckpointError(
        f"the checkpoints in {path} must be readable, got: {error}",
        fix="make the folder and its files readable, or pass another path=; nothing was changed",
    )


def _listed(path: Path) -> list[str]:
    """Returns the names in a folder, or none if it does not exist."""
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError as error:
        if path.is_symlink():
            raise inaccessible(path, f"a link to {os.readlink(path)}, which is missing") from error
        return []
    except OSError as error:
        raise inaccessible(path, error) from error


def _is_folder(path: Path) -> bool:
    return _has_mode(path, stat.S_ISDIR)


def _is_file(path: Path) -> bool:
    return _has_mode(path, stat.S_ISREG)


def _has_mode(path: Path, is_mode: Any) -> bool:
    """Like `pathlib.Path.is_dir`, but raises if the system does not allow to look."""
    try:
        return bool(is_mode(path.stat().st_mode))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise inaccessible(path, error) from error


def delete(folder: Path) -> None:
    """Deletes a checkpoint. A partly deleted checkpoint never counts as complete."""
    gone = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}{DELETED}")
    with contextlib.suppress(OSError):
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def tidy(path: Path) -> None:
    """Cleans up after a killed run. The caller must own the lock of the folder."""
    for name in _listed(path):
        with contextlib.suppress(OSError):
            if name.endswith(REPLACED):
                target = path / name.removesuffix(REPLACED)
                if target.exists():
                    delete(path / name)
                else:
                    os.rename(path / name, target)
            elif UNFINISHED in name or name.endswith(DELETED):
                shutil.rmtree(path / name, ignore_errors=True)
