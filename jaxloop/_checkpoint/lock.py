"""The lock of a folder of checkpoints. It lets one run at a time write there.

    lock = FolderLock(Path("runs/a"))
    lock.acquire()                          # or an error that names the owner
    lock.check()                            # before each save
    lock.release()

The lock is the file ``.jaxloop-lock``, which says who owns it. A thread of the owner touches the
file every few seconds. Readers need no lock, and change nothing in the folder.

A lock is stale if its owner is dead. On the same machine, the process table tells. On another
machine, or in another container, nothing but the file can tell: the lock is stale if its owner does
not touch it for half a minute, which a run that waits for it measures itself, because the clocks of
two machines may differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import socket
import stat
import threading
import uuid
from pathlib import Path
from typing import Any

from jaxloop.errors import CheckpointError

logger = logging.getLogger("jaxloop")

NAME = ".jaxloop-lock"

_TOUCHED_EVERY_S = 5.0
"""The seconds between two touches by the owner."""

_STALE_AFTER_S = 30.0
"""A lock on another machine is stale if nobody touches it for these seconds."""

_MOST_TRIES = 20
"""The maximum number of attempts to create the file while other runs create and remove it."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that a lock names.

    Attributes:
        process: Words for people, such as "process 12 on here".
        since: When it acquired the lock, as a date and a time, or None if it does not say.
        touched_at: The Unix time of the last touch, by the clock of the file system.
        is_running: Whether it runs, or None if only its touches can tell.
    """

    process: str
    since: str | None
    touched_at: float
    is_running: bool | None


def owner_of(folder: Path) -> Owner | None:
    """Returns who has the lock of a folder, or None if nobody has. Changes nothing.

    Raises:
        CheckpointError: The lock cannot be read.
    """
    owner, text = _read(folder / NAME)
    touched_at = last_touched(folder)
    if text is None or touched_at is None:
        return None
    since = owner.get("since")
    return Owner(
        _process_of(owner),
        since if isinstance(since, str) else None,
        touched_at,
        _is_running(owner),
    )


class FolderLock:
    """The lock of a folder. It belongs to the process that acquires it, and to no fork of it.

    Args:
        folder: The folder, which must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._token = uuid.uuid4().hex
        self._pid = -1
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Acquires the lock, and takes it over from an owner that is dead.

        Raises:
            CheckpointError: Another run owns the lock, or the file cannot be written.
        """
        owner: dict[str, Any] = {}
        for _ in range(_MOST_TRIES):
            if self._create():
                break
            owner, text = _read(self._path)
            if text is not None:  # None means that it was released just now
                if _is_alive(owner, self._path):
                    raise self._owned(owner)
                _remove(self._path, text)
        else:
            raise self._owned(owner)
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._touch, name="jaxloop-lock", daemon=True)
        self._thread.start()

    def check_free(self) -> None:
        """Raises if another run surely owns the lock. Changes nothing, and does not wait.

        Raises:
            CheckpointError: The owner is alive on this machine, or the lock cannot be read.
        """
        owner, text = _read(self._path)
        if text is not None and _is_running(owner):
            raise self._owned(owner)

    def check(self) -> None:
        """Raises if this process no longer owns the lock.

        Raises:
            CheckpointError: Another run took the lock over, or this process is a fork.
        """
        owner, text = _read(self._path)
        if text is None and self._pid == os.getpid():
            # The folder was moved or emptied while the run continued.
            if self._path.parent.is_dir() and self._create():
                return
        elif self._is_mine(owner):
            return
        if text is not None:
            raise self._owned(owner)

    def release(self) -> None:
        """Releases the lock, if this process owns it."""
        if self._pid != os.getpid():
            return
        self._pid = -1
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):  # a lock that stays is stale once the process ends
            if _read(self._path)[0].get("token") == self._token:
                self._path.unlink()

    def _is_mine(self, owner: dict[str, Any]) -> bool:
        return self._pid == os.getpid() and owner.get("token") == self._token

    def _create(self) -> bool:
        """Creates the file, and returns whether it did not exist before."""
        try:
            handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        except OSError as error:
            raise self._not_written(error) from error
        try:
            with os.fdopen(handle, "w") as file:
                # The time comes from the file system, as that of each touch does.
                since = datetime.datetime.fromtimestamp(os.fstat(handle).st_mtime)
                file.write(json.dumps(self._owner(since)))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._path.unlink()
            raise self._not_written(error) from error
        return True

    def _owner(self, since: datetime.datetime) -> dict[str, Any]:
        return {
            "token": self._token,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": since.isoformat(" ", "seconds"),
            "since_s": since.timestamp(),
            "machine": _machine(),
            "process": _process(os.getpid()),
        }

    def _not_written(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"the lock {self._path} must be a file that can be written, got: {error}",
            fix="make sure that the folder is writable and has space, or pass another path=",
        )

    def _touch(self) -> None:
        while not self._released.wait(_TOUCHED_EVERY_S):
            # Without the folder, there is nothing to keep. The next save raises.
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _owned(self, owner: dict[str, Any]) -> CheckpointError:
        process = _process_of(owner)
        if owner.get("pid") == os.getpid() and owner.get("host") == socket.gethostname():
            process = "another run of this process"
        return CheckpointError(
            f"only one run can write checkpoints to {self._path.parent}, got a second one; it "
            f"belongs to {process} since {owner.get('since', 'an unknown time')}",
            fix="pass another path=, or end the other run (close the iterator of loop.stream); if "
            f"no run writes there, delete {self._path}",
        )


def _process_of(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'unknown')}"


def last_touched(folder: Path) -> float | None:
    """Returns when the owner of a folder last touched its lock, in seconds since 1970.

    None means that there is no lock, because the last run released it.
    """
    touched = _touched_at(folder / NAME)
    return None if touched is None else touched / 1e9


def held_for(folder: Path) -> tuple[float, float] | None:
    """Returns when the owner of a folder acquired its lock and when it last touched it.

    Both are in seconds since 1970. The first is 0 if the lock does not say it. None means that
    there is no lock, because the last run released it.
    """
    touched = last_touched(folder)
    if touched is None:
        return None
    with contextlib.suppress(CheckpointError):
        since = _read(folder / NAME)[0].get("since_s")
        if isinstance(since, int | float):
            return float(since), touched
    return 0.0, touched


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    """Returns the owner that the lock names, and the text of the file, or None if there is none."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            raise OSError("it is not a file")
        with path.open(errors="replace") as file:
            text = file.read(10_000)
    except FileNotFoundError:
        return {}, None
    except OSError as error:
        raise CheckpointError(
            f"the lock {path} must be a file that can be read, got: {error}",
            fix=f"make it readable or, if no run writes there, delete {path}",
        ) from error
    with contextlib.suppress(ValueError, RecursionError):
        owner = json.loads(text)
        if isinstance(owner, dict):
            return owner, text
    return {}, text  # it is being written, or its owner died while writing it


def _is_alive(owner: dict[str, Any], path: Path) -> bool:
    """Returns whether the owner of a lock is alive."""
    running = _is_running(owner)
    return _is_touched(owner, path) if running is None else running


def _is_running(owner: dict[str, Any]) -> bool | None:
    """Returns whether the process table says that the owner runs, or None if it cannot say."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or owner.get("machine") != _machine():
        return None
    started = _process(pid)
    if started is not None:
        return started == owner.get("process")
    return None if _exists(pid) else False


def _is_touched(owner: dict[str, Any], path: Path) -> bool:
    """Waits until somebody touches the file, and returns whether that happens in time."""
    logger.warning(
        "waiting up to %.0f s to see whether process %s on %s still writes to %s",
        _STALE_AFTER_S,
        owner.get("pid", "unknown"),
        owner.get("host", "unknown"),
        path.parent,
    )
    before, pause = _touched_at(path), threading.Event()
    for _ in range(int(_STALE_AFTER_S)):
        pause.wait(1.0)
        now = _touched_at(path)
        if now != before:
            return now is not None
    return False


def _touched_at(path: Path) -> int | None:
    # Opened, because a network file system may otherwise answer from its cache.
    with contextlib.suppress(OSError), path.open() as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return None


def _remove(path: Path, text: str) -> None:
    """Removes a stale lock, unless another run has just taken it over."""
    gone = path.with_name(f"{NAME}.{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        os.rename(path, gone)
        if _read(gone)[1] != text:
            with contextlib.suppress(FileExistsError):
                os.link(gone, path)
        gone.unlink()


def _exists(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _machine() -> str | None:
    """Returns what tells this machine and container from others, or None if unknown.

    Process numbers mean nothing outside of it.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def _process(pid: int) -> str | None:
    """Returns what tells a process from a later one with the same number.

    Returns:
        The time of its start, "dead", or None if the system does not tell.
    """
    if not Path("/proc/self/stat").exists():
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None if _exists(pid) else "dead"  # some systems hide the processes of others
    return "dead" if fields[0] in "ZX" else fields[19]
