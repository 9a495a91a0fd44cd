"""Writes states to a folder of checkpoints while a loop continues.

    writer = Writer("runs/a", keep=3, keep_best=1, keep_every=None)
    writer.save("120", state, value=None)
    writer.begin()                              # written in the background
    writer.close()

A checkpoint is deleted only when its replacement is complete.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

from jaxloop._checkpoint.layout import REPLACED, delete, entries, read, tidy
from jaxloop._checkpoint.orbax_io import OrbaxIO, are_on_cpu, empty_arrays
from jaxloop._checkpoint.record import pack, seal
from jaxloop._core.state import State
from jaxloop.errors import CheckpointError, first_line

_UNCHANGED = (
    "make sure that the folder exists, is writable and has space; the earlier checkpoints are "
    "unchanged, and loop.resume(path) continues from the newest"
)


class Writer:
    """A folder of checkpoints, written in the background.

    A new checkpoint replaces one of the same name. The old one is deleted when the new one is
    complete.

    Args:
        path: The folder.
        keep: How many of the newest checkpoints to keep. None keeps all.
        keep_best: How many of those that were the best when they were saved to keep as well.
        keep_every: Also keep every checkpoint whose step is a multiple of this, unless None.
    """

    def __init__(
        self, path: str, *, keep: int | None, keep_best: int = 1, keep_every: int | None = None
    ) -> None:
        self.path = Path(path).absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        tidy(self.path)
        self._keep, self._keep_best, self._keep_every = keep, keep_best, keep_every
        self._io = OrbaxIO()
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="jaxloop-save")
        self._prepared: Callable[[], None] | None = None
        self._in_thread: futures.Future[None] | None = None
        self._in_orbax = False
        self._order = max((entry.order for entry in entries(self.path)), default=0)

    def save(self, name: str, state: State[Any], value: float | None) -> None:
        """Prepares to save ``state``. Waits for an earlier save, but not for this one.

        As long as the writer keeps the state, its arrays must be copied before they are donated.

        Args:
            name: The name of the checkpoint's folder.
            state: The state.
            value: The value by which it is the best so far, or None.

        Raises:
            CheckpointError: The state or the previous save could not be written.
        """
        record, trees = pack(state)
        self.wait()
        if not self.path.is_dir():
            raise CheckpointError(f"the folder {self.path} has vanished", fix=_UNCHANGED)
        self._order += 1
        target, old = self.path / name, self.path / (name + REPLACED)
        try:
            if target.exists():
                before = read(target).record
                if before is not None and before["step"] == state.step and value is None:
                    value = before["value"]  # it is still the best
                os.rename(target, old)
            record |= {"order": self._order, "value": value, "empty": empty_arrays(trees)}
            seal(record)
            arguments = self._io.arguments(record, trees)
            if are_on_cpu(trees):
                # Nothing has to be copied to the host, so the thread can do all of the work.
                self._prepared = functools.partial(self._write, target, arguments, state)
            else:
                # The device may have no room for a copy, so this waits for a copy on the host.
                self._in_orbax = True
                self._io.start_saving(target, arguments)
        except Exception as error:  # Orbax and TensorStore raise errors of many kinds
            raise self._failed(error) from error

    def begin(self) -> None:
        """Starts writing what `save` prepared, if it has not started yet.

        This is separate from `save`, so that the loop makes its copies before a thread is busy.
        """
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            self._in_thread = self._thread.submit(prepared)

    def _write(self, target: Path, arguments: Any, state: State[Any]) -> None:
        """Writes a checkpoint. It keeps ``state``, so that the arrays are not donated."""
        self._io.save_now(target, arguments)
        del state
        self._settle()

    def poll(self) -> None:
        """Raises if a background save has failed. Does not wait.

        Raises:
            CheckpointError: A save has failed.
        """
        if self._in_thread is not None:
            if self._in_thread.done():
                self.wait()
        elif self._in_orbax:
            try:
                self._io.poll()
            except Exception as error:
                raise self._failed(error) from error

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            CheckpointError: A save has failed.
        """
        self.begin()
        in_thread, self._in_thread = self._in_thread, None
        in_orbax, self._in_orbax = self._in_orbax, False
        try:
            if in_thread is not None:
                in_thread.result()
            elif in_orbax:
                self._io.wait()
                self._settle()
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        tidy(self.path)
        return CheckpointError(
            f"a checkpoint in {self.path} could not be written: {first_line(error)}",
            fix=_UNCHANGED,
        )

    def _settle(self) -> None:
        """Deletes the checkpoints that are not needed once a new one is complete."""
        for old in self.path.glob("*" + REPLACED):
            if (self.path / old.name.removesuffix(REPLACED)).exists():
                delete(old)
        if self._keep is None:
            return
        good = [entry for entry in entries(self.path) if entry.record is not None]
        best = [entry for entry in good if entry.value is not None][: self._keep_best]
        for entry in good[self._keep :]:
            regular = self._keep_every is not None and entry.step % self._keep_every == 0
            if entry not in best and not regular:
                delete(entry.folder)

    def close(self) -> None:
        """Waits until everything is on disk, and stops the threads.

        Raises:
            CheckpointError: The last save failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._io.close()
