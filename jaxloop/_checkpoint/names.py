"""The paths of checkpoint folders, and the names of the checkpoints in them.

    folder = check_path("checkpoint", "~/runs/a")       # "/home/you/runs/a"
    name = check_name("epoch-07")                       # one folder, directly in the path

A name that could not be found again, or that would write outside the folder, is an error.
"""

from __future__ import annotations

import os

from jaxloop.errors import ArgumentError, ArgumentTypeError

REPLACED, DELETED, UNFINISHED = ".replaced", ".deleted", ".orbax-checkpoint-tmp"
"""The markers in the names of folders that are not complete checkpoints."""

_LONGEST = 200
"""The maximum length of a name in bytes. File systems allow 255, and Orbax adds a suffix."""


def check_path(where: str, path: object) -> str:
    """Returns the path of a folder as a string. ``~`` becomes the home directory.

    Raises:
        ArgumentTypeError: ``path`` is not a path.
        ArgumentError: ``path`` is empty, or is the address of a remote storage.

    Example:
        >>> check_path("checkpoint", "runs/a/")
        'runs/a/'
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ArgumentTypeError(
            f"{where}: path must be a string or a pathlib.Path, got {path!r}",
            fix=f"pass the path of a folder, or do not call {where}",
        )
    folder = str(os.fspath(path))
    if not folder.strip():
        raise ArgumentError(
            f"{where}: path must not be empty, got {folder!r}", fix="pass the path of a folder"
        )
    if "\0" in folder:
        raise ArgumentError(
            f"{where}: path must not contain a NUL character, got {folder!r}",
            fix="pass the path of a folder",
        )
    scheme, colon, _ = folder.partition(":/")  # pathlib turns "gs://bucket" into "gs:/bucket"
    if colon and scheme.isalnum() and len(scheme) > 1:
        raise ArgumentError(
            f"{where}: path must be a local folder, got {folder!r}; jaxloop does not write to "
            "remote storage",
            fix="pass a local or mounted folder, and copy it to the storage after the run",
        )
    return os.path.expanduser(folder)


def check_name(name: object) -> str:
    """Returns the name of a checkpoint's folder.

    Raises:
        ArgumentTypeError: The name is not a string.
        ArgumentError: The name is not the name of a folder, or has another meaning.

    Example:
        >>> check_name("epoch.07")
        'epoch.07'
    """
    if not isinstance(name, str):
        raise ArgumentTypeError(
            f"checkpoint: file_pattern must return a string, got {name!r}",
            fix="return a name, such as f'step-{state.step}'",
        )
    problem = _problem(name)
    if problem:
        raise ArgumentError(
            f"checkpoint: file_pattern must return the name of a folder, got {_short(name)}, "
            f"which {problem}",
            fix="return a short name without separators, such as f'step-{state.step}'",
        )
    return str(name)


def _problem(name: str) -> str:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if not name.strip():
        return "is empty"
    if name in (".", ".."):
        return "is not a folder in the path"
    if any(sign in name for sign in "/\\\0*?[]"):
        return "contains a separator, a NUL character or one of *?[]"
    if size > _LONGEST:
        return f"has {size} bytes, more than {_LONGEST}"
    if name.endswith((REPLACED, DELETED)) or UNFINISHED in name or name.startswith("."):
        return "is reserved for folders that are not complete, or for other files"
    return ""


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else name[:60] + "...")
