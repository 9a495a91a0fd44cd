"""A file of lines, one per step, that a killed run leaves whole.

    file = LineFile.open(path, 120, form)       # drops what was written after step 120
    file.append(121, b"121,0.5\\n")
    file.replace_last(b"121,0.5,0.9\\n")
    file.flush()
    file.close()

Invariant: at any instant, the file has every complete line that was appended, and at most its last
line is torn.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxloop.errors import WriterError

try:
    import fcntl
except ImportError:  # on Windows, where nothing holds off a second run
    fcntl = None  # type: ignore[assignment]


class LineForm(NamedTuple):
    """The form of the lines of a file.

    Attributes:
        kind: The name of the writer, for errors.
        header: The first line of a new file, or b"" if it has none.
        is_own: Whether a file of this writer may begin with a line, which may be torn.
        step_of: Returns the step of a line. It raises `ValueError` if the line has none.
    """

    kind: str
    header: bytes
    is_own: Callable[[bytes], bool]
    step_of: Callable[[bytes], int]


class LineFile:
    """A file of lines that is open for appending.

    Args:
        path: The path.
        file: The open file.

    Attributes:
        path: The path.
        last: The last line, or b"" if the file has none besides its header.
    """

    def __init__(self, path: Path, file: io.FileIO) -> None:
        self.path, self.last = path, b""
        self._file, self._last_at = file, 0

    @classmethod
    def open(cls, path: Path, step: int, form: LineForm, *, keep_other: bool = False) -> LineFile:
        """Opens a file for a run.

        If the run is fresh, an earlier file of this writer is renamed, ``metrics.csv`` to
        ``metrics.1.csv``. If it resumes, the lines after ``step`` and a torn last line are dropped.

        Args:
            path: The path. Missing folders are made.
            step: The step from which the run resumes, or 0.
            form: The form of the lines.
            keep_other: Whether lines to drop belong to another run. The file is then copied first,
                ``metrics.csv`` to ``metrics.1.csv``.

        Raises:
            WriterError: The file is not one of this writer, or another run writes to it.
            OSError: The file cannot be read or written.
        """
        # A script may change its working directory, and a link must stay one.
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open(path)
        opened = cls(path, file)
        try:
            _lock(file, path, form.kind)
            # This descriptor must not be closed: closing any of a file's drops the lock.
            with open(file.fileno(), "rb", closefd=False) as lines:
                first = lines.readline()
                if first and not form.is_own(first):
                    raise _foreign(path, form.kind)
                is_empty = not (lines.read(1) if form.header else first.endswith(b"\n"))
                if step and not is_empty:
                    lines.seek(len(first) if form.header else 0)
                    opened._continue(lines, step, form, keep_other)
                    return opened
            if is_empty:
                opened.rewrite([form.header])
                return opened
            os.rename(path, _free_name(path))
        except BaseException:
            file.close()
            raise
        file.close()
        return cls.open(path, step, form)

    def _continue(
        self, lines: io.BufferedReader, step: int, form: LineForm, keep_other: bool
    ) -> None:
        """Drops the lines after ``step``, in one system call."""
        end = lines.tell()
        for line in lines:
            if not line.endswith(b"\n"):
                break
            try:
                if form.step_of(line) > step:
                    break
            except ValueError:
                raise _foreign(self.path, form.kind) from None
            self.last, self._last_at = line, end
            end += len(line)
        if os.fstat(self._file.fileno()).st_size > end:
            if keep_other:
                _free_name(self.path).write_bytes(self.read())
            self._file.truncate(end)
        self._file.seek(end)

    def append(self, line: bytes) -> None:
        """Appends a line. If this fails, the file is as it was."""
        at = self._file.tell()
        try:
            _write_all(self._file, line)
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.truncate(at)
                self._file.seek(at)
            raise
        self.last, self._last_at = line, at

    def replace_last(self, line: bytes) -> None:
        """Replaces the last line. The file has the old line or the new one at any instant."""
        self.rewrite([self.read()[: self._last_at], line], has_rows=True)

    def read(self) -> bytes:
        """Returns the whole file."""
        self._file.seek(0)
        return self._file.readall()

    def rewrite(self, parts: list[bytes], *, has_rows: bool = False) -> None:
        """Replaces the whole file at once.

        Args:
            parts: The new contents.
            has_rows: Whether the last part is a line with a step.
        """
        self._check_in_place()
        beside = self.path.with_name(f".{self.path.name}.new")
        new = _open(beside, os.O_TRUNC)
        try:
            _lock(new, beside, "file")
            for part in parts:
                _write_all(new, part)
            os.fsync(new.fileno())
            os.replace(beside, self.path)
        except BaseException:
            new.close()
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
        self._file.close()
        self._file = new
        self.last = parts[-1] if has_rows else b""
        self._last_at = new.tell() - len(self.last)

    def flush(self) -> None:
        """Waits until the lines are on the disk."""
        self._check_in_place()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        try:
            self._check_in_place()
        finally:
            self._file.close()

    def _check_in_place(self) -> None:
        """Raises if the path names another file now: what is written would be lost."""
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return
        except FileNotFoundError:
            pass
        raise WriterError(
            f"the file {str(self.path)!r} must stay in place while a run writes to it, got a "
            "file that was removed or replaced",
            fix="let each run write to a path of its own, and leave it alone until the run ends",
        )


def _open(path: Path, flags: int = 0) -> io.FileIO:
    """Opens a file for reading and writing, and makes it if it is missing.

    None of Python's own modes does this without truncating the file.
    """
    return io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o666), "r+")


def _write_all(file: io.FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _lock(file: io.FileIO, path: Path, kind: str) -> None:
    """Locks a file for this process, and no longer than it lives. Its forks do not keep the lock.

    File systems without locks hold off nobody.
    """
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise WriterError(
            f"{kind}: one run at a time must write to {str(path)!r}, got a second one",
            fix="wait for the other process to end, or pass another path",
        ) from None
    except OSError:
        return


def _foreign(path: Path, kind: str) -> WriterError:
    return WriterError(
        f"{kind}: {str(path)!r} must be missing or written by this writer, got a file with other "
        "contents",
        fix="pass another path, or move the file",
    )


def _free_name(path: Path) -> Path:
    """Returns the first unused name among ``metrics.1.csv``, ``metrics.2.csv``, and so on."""
    n = 1
    while os.path.lexists(free := path.with_name(f"{path.stem}.{n}{path.suffix}")):
        n += 1
    return free
