"""Writes states to a folder of checkpoints while a loop continues.

    writer = Writer("runs/a")
    rule = Rule("checkpoint", keep=3)
    writer.add(rule)
    writer.save("120", state, rule, value=None)
    writer.begin()                              # written in the background
    writer.close()

A writer owns the lock of its folder. It deletes only checkpoints that its own run has written, and
only once their replacement is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from concurrent import futures
from pathlib import Path
from typing import Any

from jaxloop._checkpoint.digests import digests
from jaxloop._checkpoint.layout import Entry, delete, entries, read, tidy
from jaxloop._checkpoint.lock import FolderLock
from jaxloop._checkpoint.names import REPLACED, check_name
from jaxloop._checkpoint.orbax_io import empty_arrays, on_host, save_trees
from jaxloop._checkpoint.record import pack, seal
from jaxloop._checkpoint.retention import Rule, best, kept
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop.errors import CheckpointError, first_line

_UNCHANGED = (
    "make sure that the folder exists, is writable and has space; the earlier checkpoints are "
    "unchanged, and loop.resume(path) continues from the newest"
)


@dataclasses.dataclass
class _Save:
    """A state that is to be written.

    It keeps the state, so that the engine copies the arrays before it donates them.
    """

    name: str
    state: State[Any] | None
    record: dict[str, Any]
    trees: dict[str, PyTree]


class Writer:
    """A folder of checkpoints, written in the background.

    A new checkpoint replaces one of the same name, if the same run wrote that one and no rule needs
    it as the best. Otherwise the new one gets another name, such as "120_2".

    Args:
        path: The folder.

    Attributes:
        newest_complete: The folder of the newest checkpoint that it has completed, or None.

    Raises:
        CheckpointError: Another run writes to the folder.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        self._lock.acquire()
        try:
            tidy(self.path)
            self._order = max((entry.order for entry in entries(self.path)), default=0)
        except BaseException:
            self._lock.release()
            raise
        self._rules: list[Rule] = []
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="jaxloop-save")
        self._prepared: list[_Save] = []
        self._written: futures.Future[None] | None = None
        self._num_users = 0
        self.newest_complete: str | None = None

    def add(self, rule: Rule) -> None:
        """Adds the rule of a trigger that saves here. Each trigger calls `close` once."""
        self._rules.append(rule)
        self._num_users += 1

    def save(self, name: str, state: State[Any], rule: Rule, value: float | None) -> None:
        """Prepares to save ``state``. Waits for an earlier save, but not for this one.

        As long as the writer keeps the state, its arrays must be copied before they are donated.
        If two triggers save the same state under the same name, it is written once.

        Args:
            name: The name of the checkpoint's folder.
            state: The state.
            rule: The rule of the trigger that asks for the save.
            value: The value by which it is the best so far, or None.

        Raises:
            ArgumentError: The name is not the name of a folder.
            CheckpointError: The state or the previous save could not be written.
        """
        name = check_name(name)
        for other in self._prepared:
            if other.name == name and other.state is state:
                other.record["saved_by"].append(rule.name)
                if value is not None:
                    other.record["value"] = value
                return
        record, trees = pack(state)
        self._finish()
        if not self.path.is_dir():
            raise CheckpointError(f"the folder {self.path} has vanished", fix=_UNCHANGED)
        self._lock.check()
        self._order += 1
        record |= {
            "order": self._order,
            "value": value,
            "saved_by": [rule.name],
            "empty": empty_arrays(trees),
        }
        try:
            trees = on_host(trees)
        except Exception as error:  # the device raises errors of many kinds
            raise self._failed(error) from error
        self._prepared.append(_Save(name, state, record, trees))

    def begin(self) -> None:
        """Starts writing what `save` prepared, if it has not started yet.

        This is separate from `save`, so that the loop makes its copies before a thread is busy.
        """
        prepared, self._prepared = self._prepared, []
        if prepared:
            self._written = self._thread.submit(self._write_all, prepared)

    def poll(self) -> None:
        """Raises if a background save has failed. Does not wait.

        Raises:
            CheckpointError: A save has failed.
        """
        if self._written is not None and self._written.done():
            self._finish()

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            CheckpointError: A save has failed.
        """
        self.begin()
        self._finish()

    def close(self) -> None:
        """Waits until everything is on disk. The last user's call stops the thread.

        Raises:
            CheckpointError: The last save failed.
        """
        self._num_users -= 1
        try:
            self.wait()
        finally:
            if self._num_users <= 0:
                self._thread.shutdown()
                self._lock.release()

    def _finish(self) -> None:
        """Waits for the saves that have begun."""
        written, self._written = self._written, None
        if written is not None:
            try:
                written.result()
            except Exception as error:
                raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        with contextlib.suppress(CheckpointError):
            tidy(self.path)
        return CheckpointError(
            f"a checkpoint in {self.path} could not be written: {first_line(error)}",
            fix=_UNCHANGED,
        )

    # --- in the thread -------------------------------------------------------------------------

    def _write_all(self, saves: list[_Save]) -> None:
        while saves:
            self._write(saves.pop(0))

    def _write(self, save: _Save) -> None:
        """Writes a checkpoint, and deletes those that are not needed any more."""
        record = save.record
        record["digests"] = digests(save.trees)
        target = self._target(save.name, record)
        if target.exists():
            os.rename(target, target.with_name(target.name + REPLACED))
        seal(record)
        save_trees(target, record, save.trees)
        self.newest_complete = str(target)
        save.state, save.trees = None, {}
        self._settle(record["run_id"])

    def _target(self, name: str, record: dict[str, Any]) -> Path:
        """Returns the folder for a checkpoint: free, or of a checkpoint that it may replace."""
        target, number = self.path / name, 1
        while target.exists() and not self._may_replace(target, record):
            number += 1
            target = self.path / f"{name}_{number}"
        return target

    def _may_replace(self, folder: Path, record: dict[str, Any]) -> bool:
        """Returns whether a checkpoint may be replaced by one with ``record``, which it adapts."""
        old, run_id = read(folder), record["run_id"]
        if old.run_id is None or old.run_id != run_id:
            return False
        own = self._own(run_id)
        if old.step == record["step"]:
            if old.value is not None and record["value"] in (None, old.value):
                same = old.record is not None and _step_state(old.record) == _step_state(record)
                # If a handler has changed the state since, then only the old one is the best.
                record["value"] = old.value if same else None
                if not same and old in best(own, self._rules):
                    return False
            record["saved_by"] = sorted({*record["saved_by"], *old.saved_by})
            return True
        if record["value"] is not None:
            own.insert(0, Entry(folder, record))
        return old not in best(own, self._rules)

    def _own(self, run_id: str | None) -> list[Entry]:
        """Returns the checkpoints that the run has written, the newest first."""
        if run_id is None:
            return []
        return [entry for entry in entries(self.path) if entry.run_id == run_id]

    def _settle(self, run_id: str | None) -> None:
        """Deletes the checkpoints that are not needed once a new one is complete."""
        for name in os.listdir(self.path):
            if name.endswith(REPLACED) and (self.path / name.removesuffix(REPLACED)).exists():
                delete(self.path / name)
        if any(rule.keep is not None for rule in self._rules):
            own = self._own(run_id)
            needed = kept(own, self._rules)
            for entry in own:
                if entry not in needed:
                    delete(entry.folder)


def _step_state(record: dict[str, Any]) -> Any:
    return record["digests"]["step_state"]
