"""Writes states to a folder of checkpoints, through Orbax, while a loop goes on.

    store = Store("runs/a", keep=3, keep_best=1, keep_every=None)
    store.save("120", state, value=None)
    store.begin()                               # written in the background
    store.close()

What is there is deleted only when what takes its place is complete.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import jax

from jaxloop._checkpoint.layout import REPLACED, delete, entries, read, tidy
from jaxloop._checkpoint.orbax_io import (
    ONE_SAVE,
    empty_arrays,
    end_waiting,
    filled,
    on_cpu,
    uncounted,
)
from jaxloop._checkpoint.record import checksum, pack
from jaxloop._core.state import State
from jaxloop.errors import CheckpointError, first_line

UNTOUCHED = (
    "see that the folder is there, is writable and has room; the checkpoints before it are as they "
    "were, and loop.resume(path) goes on from the newest"
)


class Store:
    """A folder of checkpoints, written in the background.

    A checkpoint of a name that is there already replaces it; the old one goes only once the new one
    is complete.

    Args:
        path: The folder.
        keep: How many of the newest stay; None: all.
        keep_best: How many of those that were the best when they were saved stay beside them.
        keep_every: Those whose step is a multiple of it stay too; None: no more.
    """

    def __init__(
        self, path: str, *, keep: int | None, keep_best: int = 1, keep_every: int | None = None
    ) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.path = Path(path).absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        tidy(self.path)
        self._keep, self._keep_best, self._keep_every = keep, keep_best, keep_every
        # Directories made in the background leave threads that wait for minutes if that fails.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), async_options=options
        )
        self._synchronous = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._writer = futures.ThreadPoolExecutor(1, thread_name_prefix="jaxloop-save")
        self._ready: Callable[[], None] | None = None
        # The save that goes on: a thread's, or all that Orbax does.
        self._writing: futures.Future[None] | Any = None
        self._order = max((entry.order for entry in entries(self.path)), default=0)

    def save(self, name: str, state: State, value: float | None) -> None:
        """Makes ready to save ``state``; waits for an earlier save, not for this one.

        Whoever donates the state's arrays copies them first, as long as the state is kept here.

        Args:
            name: Of the checkpoint's folder.
            state: What is saved.
            value: Of the metric whose best this is, or None.

        Raises:
            CheckpointError: It cannot be written, or the one before could not.
        """
        ocp = self._ocp
        record, trees = pack(state)
        self.wait()
        if not self.path.is_dir():
            raise CheckpointError(f"the folder {self.path} has vanished", fix=UNTOUCHED)
        self._order += 1
        target, old = self.path / name, self.path / (name + REPLACED)
        try:
            if target.exists():
                before = read(target).record
                if before is not None and before["step"] == state.step and value is None:
                    value = before["value"]  # it stays the best that it was
                os.rename(target, old)
            record |= {"order": self._order, "value": value, "empty": empty_arrays(trees)}
            record["sha256"] = checksum(record)
            # In a dict, as Orbax takes no tree that is a single array.
            items = {
                key: ocp.args.StandardSave({"tree": jax.tree.map(filled, tree)})
                for key, tree in trees.items()
                if jax.tree.leaves(tree)
            }
            args = ocp.args.Composite(meta=ocp.args.JsonSave(record), **items)
            if on_cpu(trees):
                # Nothing has to be copied to the host: all of the work is done beside the loop.
                self._ready = functools.partial(self._write, target, args, state)
            else:
                # Returns when the host has a copy; the device needs no room for a second one.
                self._writing = self._checkpointer
                with ONE_SAVE:
                    self._checkpointer.save(target, args=args)
        except Exception as error:  # Orbax and TensorStore raise errors of many kinds
            raise self._failed(error) from error

    def begin(self) -> None:
        """Begins to write what `save` made ready, unless that has begun.

        Apart, so that the loop has copied what it donates before a thread is in its way.
        """
        ready, self._ready = self._ready, None
        if ready is not None:
            self._writing = self._writer.submit(ready)

    def _write(self, target: Path, args: Any, state: State) -> None:
        """Writes all of a checkpoint.

        For as long as that takes, ``state`` is kept, so that nobody donates its arrays.
        """
        del state
        with ONE_SAVE, uncounted():
            try:
                self._synchronous.save(target, args=args)
            except Exception:
                end_waiting()
                raise
        self._settle()

    def poll(self) -> None:
        """Raises if a save in the background has failed; does not wait.

        Raises:
            CheckpointError: It has.
        """
        if isinstance(self._writing, futures.Future):
            if self._writing.done():
                self.wait()
        elif self._writing is not None:
            try:
                self._writing.check_for_errors()
            except Exception as error:
                raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        tidy(self.path)
        return CheckpointError(
            f"a checkpoint in {self.path} could not be written: {first_line(error)}", fix=UNTOUCHED
        )

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
            CheckpointError: It could not be written.
        """
        self.begin()
        writing, self._writing = self._writing, None
        try:
            if isinstance(writing, futures.Future):
                writing.result()
            elif writing is not None:
                self._wait_for_orbax()
        except Exception as error:
            raise self._failed(error) from error

    def _wait_for_orbax(self) -> None:
        try:
            self._checkpointer.wait_until_finished()
        except Exception:
            end_waiting()
            raise
        self._settle()

    def _settle(self) -> None:
        """Deletes what a checkpoint that is complete now makes superfluous."""
        for old in self.path.glob("*" + REPLACED):
            if (self.path / old.name.removesuffix(REPLACED)).exists():
                delete(old)
        self._retain()

    def _retain(self) -> None:
        """Deletes what is neither new nor best; only what is complete counts."""
        if self._keep is None:
            return
        there = [entry for entry in entries(self.path) if entry.record is not None]
        best = [entry for entry in there if entry.value is not None][: self._keep_best]
        for entry in there[self._keep :]:
            often = self._keep_every is not None and entry.step % self._keep_every == 0
            if entry not in best and not often:
                delete(entry.folder)

    def close(self) -> None:
        """Waits until everything is on disk, and ends the threads.

        Raises:
            CheckpointError: The last save failed.
        """
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._checkpointer.close()
