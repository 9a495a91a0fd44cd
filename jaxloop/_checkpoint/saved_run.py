"""The checkpoints of one run in a folder, of which `replay` needs the newest before a step.

    run = newest_run("runs/a")
    run.first_step, run.last_step           # which steps it is known to have run
    state = run.load_before(1234, like)

A folder may hold the checkpoints of several runs. The newest checkpoint says which run is meant.
Reading changes nothing in the folder.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from jaxloop._checkpoint.layout import Entry, entries
from jaxloop._checkpoint.names import check_path
from jaxloop._checkpoint.reader import newest_good
from jaxloop._core.bounds import Bounds
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """The checkpoints of a run.

    Attributes:
        folder: The folder.
        checkpoints: Its checkpoints, the newest first. There is at least one.
    """

    folder: Path
    checkpoints: tuple[Entry, ...]

    @property
    def newest_step(self) -> int:
        """The step of the newest checkpoint."""
        return self.checkpoints[0].step

    @property
    def last_step(self) -> int | None:
        """The last step of the run, or None if no checkpoint shows that it has ended."""
        return None if self._newest["status"] == "running" else self.newest_step

    @property
    def first_step(self) -> int:
        """The step of the state that the run started from, or 0."""
        return int(self._newest.get("first_step", 0))

    @property
    def bounds(self) -> Bounds:
        """The bounds that the run was given last."""
        newest = self._newest
        epochs, steps = newest.get("requested_epochs"), newest.get("max_step")
        if epochs is None and steps is None:
            epochs = newest["max_epoch"]  # an early version of jaxloop wrote it
        return Bounds(epochs, newest.get("requested_iterations"), steps)

    @property
    def _newest(self) -> dict[str, Any]:
        record = self.checkpoints[0].record
        assert record is not None
        return record

    def load_before(self, step: int, like: PyTree) -> State[Any] | None:
        """Returns the newest good state before a step, or None if there is none.

        Args:
            step: The step.
            like: A step state that gives the structure and the placement of the arrays, or None.

        Raises:
            SerializationError: The checkpoint belongs to another model or optimizer.
        """
        earlier = [one for one in self.checkpoints if one.step < step]
        return newest_good(sorted(earlier, key=lambda one: -one.step), like)


def newest_run(path: str | os.PathLike[str]) -> SavedRun:
    """Returns the run that wrote the newest good checkpoint in a folder.

    Raises:
        CheckpointError: The folder has no good checkpoint, or it cannot be read.
    """
    folder = Path(check_path("replay", path)).absolute()
    good = [one for one in entries(folder) if one.record is not None]
    if not good:
        raise CheckpointError(
            f"replay: path must be a folder with checkpoints of the run, got {folder}, which has "
            "none",
            fix="pass the path= of Loop.checkpoint",
        )
    mine = [one for one in good if one.run_id == good[0].run_id]
    return SavedRun(folder, tuple(mine))
