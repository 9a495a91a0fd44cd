"""The checkpoints of one run in a folder, of which `replay` needs the newest before a step.

    run = saved_run("runs/a", 1234)
    run.first_step, run.last_step           # which steps it is known to have run
    state = run.load_before(1234, like)

A folder may hold the checkpoints of several runs. The newest checkpoint says which run is meant.
If that run was resumed with bounds that end other epochs, each part of it counts as a run here.
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
        checkpoints: Those that it can be repeated from, the newest first.
        newest: The record of its newest checkpoint. If it has saved none yet, the step that it
            started from.
    """

    folder: Path
    checkpoints: tuple[Entry, ...]
    newest: dict[str, Any]

    @property
    def newest_step(self) -> int:
        """The step of the newest checkpoint."""
        return int(self.newest["step"])

    @property
    def last_step(self) -> int | None:
        """The last step of the run, or None if no checkpoint shows that it has ended."""
        return None if self.newest["status"] == "running" else self.newest_step

    @property
    def first_step(self) -> int:
        """The step of the state that the run started from, or 0."""
        return int(self.newest.get("first_step", 0))

    @property
    def bounds(self) -> Bounds:
        """The bounds that the run was given last, as far as they are known."""
        epochs, steps = self.newest.get("requested_epochs"), self.newest.get("max_step")
        if epochs is None and steps is None:
            epochs = self.newest.get("max_epoch")  # an early version of jaxloop wrote it
        return Bounds(epochs, self.newest.get("requested_iterations"), steps)

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


def saved_run(path: str | os.PathLike[str], step: int, start: int) -> SavedRun:
    """Returns the run that wrote the newest good checkpoint in a folder.

    Args:
        path: The folder. If it is empty, the run ended before its first checkpoint.
        step: The step that is needed. If parts of the run had other bounds, it selects the part.
        start: The step of the state that a run of the loop starts from.

    Raises:
        CheckpointError: The folder does not exist, has only bad checkpoints, or cannot be read.
    """
    folder = Path(check_path("replay", path)).absolute()
    found = entries(folder)
    if not found and folder.exists():
        return SavedRun(folder, (), {"step": start, "first_step": start, "status": "running"})
    good = [one for one in found if one.record is not None]
    if not good:
        raise CheckpointError(
            f"replay: path must be a folder with checkpoints of the run, got {folder}, which has "
            "none",
            fix="pass the path= of Loop.checkpoint",
        )
    mine = [one for one in good if one.run_id == good[0].run_id]
    firsts = {_first_step(one) for one in mine}
    first = max((one for one in firsts if one < step), default=min(firsts))
    part = [one for one in mine if _first_step(one) == first]
    # The part before it ended with the newest of its checkpoints at that step.
    before = [one for one in mine if one.step == first and one not in part]
    assert part[0].record is not None
    return SavedRun(folder, (*part, *before[:1]), part[0].record)


def _first_step(entry: Entry) -> int:
    return 0 if entry.record is None else int(entry.record.get("first_step", 0))
