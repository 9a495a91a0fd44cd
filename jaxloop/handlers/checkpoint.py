"""Checkpoints, which save the whole state while a run continues.

    loop = checkpoint(loop, "runs/a", criteria="validation_accuracy", keep=3)

The trigger decides when its turn among the handlers comes. The save follows at the end of the
firing and includes the changes of every handler, even if one halted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxloop._checkpoint.names import check_name, check_path
from jaxloop._core.checks import check_count, check_mode
from jaxloop._core.dry import DryRun
from jaxloop._core.events import EventLike, as_events
from jaxloop._core.filters import FilterLike, as_filter
from jaxloop._core.state import State
from jaxloop._core.types import Mode
from jaxloop._spec import CheckpointTrigger, DecideFn, LoopSpec, RunStart, SpecT, Store
from jaxloop.errors import ArgumentError, ArgumentTypeError, CheckpointError
from jaxloop.handlers.attach import resume as resume_from
from jaxloop.handlers.monitor import is_better, read_scalar, resolved

if TYPE_CHECKING:
    from jaxloop._checkpoint.writer import Writer


def checkpoint(
    loop: SpecT,
    path: str | os.PathLike[str] = "checkpoint",
    *,
    event: EventLike = "epoch_completed",
    filter: FilterLike = "always",
    criteria: str | None = None,
    mode: Mode = "auto",
    keep: int | None = 3,
    keep_best: int = 1,
    keep_every: int | None = None,
    on_exception: bool = False,
    file_pattern: Callable[[State[Any]], str] | None = None,
    name: str | None = None,
    resume: bool = False,
) -> SpecT:
    """Saves the whole `State` with Orbax at the end of the firing, and at the end of the run.

    Each checkpoint is written in the background, to a folder that gets its name only when it is
    complete. If a save fails, the run raises at its next block or at its end. The run waits until
    the last save is on disk. A run deletes only checkpoints that it has written itself, and only
    one run at a time can write to a folder. Several checkpoints of one loop may share a folder, for
    example one for the newest states and one for the best. On SIGTERM or Ctrl-C, the run saves a
    state with the status "interrupted", and `resume` continues from there. SIGTERM then ends the
    script; see `run`.

    Args:
        loop: The loop.
        path: A local folder. ``~`` is the home directory.
        event: See `handle`.
        filter: See `handle`.
        criteria: The name of a metric. The state is saved only if this metric is the best so far.
        mode: See `monitor`.
        keep: How many of the newest checkpoints to keep. None keeps all.
        keep_best: How many of the best checkpoints, by ``criteria``, to keep as well.
        keep_every: Also keep every checkpoint whose step is a multiple of this.
        on_exception: Whether to save the last good state if an exception ends the run.
        file_pattern: Returns the name of a checkpoint's folder. Defaults to the step's number. A
            new checkpoint replaces an older one of this run with the same name, unless that is
            still the best. Then, or if another run wrote that one, the name gets a number.
        name: Its name in messages and, with ``criteria``, the key of its memory in
            ``state.handler_state``. The default is derived from the criteria.
        resume: Whether the loop also resumes from ``path``, as with `resume`.

    Returns:
        A new loop with the checkpoint.

    Raises:
        ArgumentError: An argument is out of range, or another checkpoint has the same name. Raised
            by `run` if ``file_pattern`` returns something that is not the name of a folder.
        CheckpointError: Raised by `run` if the folder cannot be written, or another run writes to
            it. The folder stays unchanged.
        DataError: Raised by `run` if the data are a one-shot iterator without its own state.
    """
    check_mode("checkpoint", mode)
    if not isinstance(resume, bool):
        raise ArgumentTypeError(
            f"checkpoint: resume must be True or False, got {resume!r}",
            fix="pass resume=True to resume from path=, or call loop.resume(other_path)",
        )
    if name is None:
        name = "checkpoint" if criteria is None else f"checkpoint_{criteria}"
    folder = FolderStore(
        check_path("checkpoint", path),
        keep=keep,
        keep_best=keep_best,
        keep_every=keep_every,
        on_exception=on_exception,
        file_pattern=file_pattern,
        name=_free_name(loop, name) if criteria is None else name,
    )
    if criteria is not None:
        _check_is_unique(loop, folder)
    criterion = _Criterion(name, str(os.fspath(path)), criteria, mode)
    loop = resume_from(loop, path) if resume else loop
    return loop.attach(
        CheckpointTrigger(
            as_events(event),
            as_filter(filter),
            folder.name,
            decide=criterion.decide,
            open_store=folder,
            value=criterion.value,
            watches=() if criteria is None else (criteria,),
            check=folder.check,
            check_state=None if file_pattern is None else folder.check_state,
            open=None if criteria is None else criterion.open,
            unique=criteria is not None,
            auto_mode=criteria is not None and mode == "auto",
            writes_to=folder.path,
            in_dry_run=_in_temporary_folder,
        )
    )


def _in_temporary_folder(trigger: CheckpointTrigger, dry: DryRun) -> CheckpointTrigger | None:
    """Returns the trigger of a dry run, which saves to a folder that is deleted."""
    folder = trigger.open_store
    if not isinstance(folder, FolderStore):
        return None
    # Triggers that share a folder still do, and others do not.
    name = hashlib.sha256(_absolute(folder).encode()).hexdigest()
    moved = dataclasses.replace(folder, path=os.path.join(dry.folder, name))
    check_state = None if trigger.check_state is None else moved.check_state
    return dataclasses.replace(
        trigger, open_store=moved, check=moved.check, check_state=check_state, writes_to=None
    )


def _free_name(loop: LoopSpec, name: str) -> str:
    """Returns the name, or the name with a number if another checkpoint of the loop has it."""
    taken, free, number = {one.name for one in loop.triggers()}, name, 1
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def _check_is_unique(loop: LoopSpec, folder: FolderStore) -> None:
    """Raises if a checkpoint with criteria cannot be told from another one of the loop."""
    for trigger in loop.triggers():
        if trigger.name == folder.name and not trigger.unique:
            raise ArgumentError(
                f"two checkpoints of this loop are named {folder.name!r}",
                fix="give one of them another name=",
            )
        other = trigger.open_store
        same = isinstance(other, FolderStore) and _absolute(other) == _absolute(folder)
        if same and trigger.watches:
            raise ArgumentError(
                "only one checkpoint with criteria can save to a folder, got a second one for "
                f"{folder.path!r}; 'best' would have two meanings",
                fix="pass a different path to each",
            )


def _absolute(folder: FolderStore) -> str:
    return os.path.abspath(folder.path)


@dataclasses.dataclass(frozen=True)
class FolderStore:
    """A folder of checkpoints that a run can open and write to.

    Pass an instance as ``open_store`` of a `CheckpointTrigger`, and its `check` as ``check``. If
    two triggers of a loop have the same folder, they share one writer.

    Attributes:
        path: The folder.
        keep: How many of the newest checkpoints to keep. None keeps all.
        keep_best: How many of the checkpoints that were the best so far to keep as well.
        keep_every: Also keep every checkpoint whose step is a multiple of this.
        on_exception: Whether to save the last good state if an exception ends the run.
        file_pattern: Returns the name of a checkpoint's folder. Defaults to the step's number.
        name: Tells its checkpoints from those of other triggers with the same folder.
    """

    path: str
    keep: int | None = 3
    keep_best: int = 1
    keep_every: int | None = None
    on_exception: bool = False
    file_pattern: Callable[[State[Any]], str] | None = None
    name: str = "checkpoint"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", check_path("checkpoint", self.path))
        for name, least in (("keep", 1), ("keep_best", 0), ("keep_every", 1)):
            count = getattr(self, name)
            if count is not None or name == "keep_best":
                check_count(name, count, at_least=least, where="checkpoint")

    def check(self, loop: LoopSpec) -> None:
        """Checks the folder before the first step."""
        # Imported here, as in `_OpenFolder`, because only a run with a checkpoint needs it.
        from jaxloop._checkpoint.reader import check_folder

        check_folder(self.path, loop.start is None and loop.resume_path is None)

    def check_state(self, state: State[Any]) -> None:
        """Checks the name that ``file_pattern`` gives to the first state.

        A pattern may read metrics that do not exist yet. Its names are then checked when it saves.
        """
        if self.file_pattern is not None:
            try:
                name = self.file_pattern(state)
            except Exception:
                return
            check_name(name)

    def __call__(self, opened: Sequence[Store] = ()) -> Store:
        """Opens the folder.

        Args:
            opened: The stores that the run has opened.
        """
        for store in opened:
            if isinstance(store, _OpenFolder) and str(store.writer.path) == _absolute(self):
                return _OpenFolder(self, store.writer)
        # Imported here, because only a run with a checkpoint needs it.
        from jaxloop._checkpoint.writer import Writer

        return _OpenFolder(self, Writer(self.path))


class _OpenFolder:
    """The `Store` of a folder."""

    def __init__(self, folder: FolderStore, writer: Writer) -> None:
        # Imported here, because only a run with a checkpoint needs it.
        from jaxloop._checkpoint.retention import Rule

        self._file_pattern = folder.file_pattern
        self.on_exception = folder.on_exception
        self.writer = writer
        self._rule = Rule(folder.name, folder.keep, folder.keep_best, folder.keep_every)
        writer.add(self._rule)

    def save(self, state: State[Any], value: float | None) -> None:
        pattern = self._file_pattern
        name = str(state.step) if pattern is None else pattern(state)
        self.writer.save(name, state, self._rule, value)

    def begin(self) -> None:
        self.writer.begin()

    def poll(self) -> None:
        self.writer.poll()

    def newest(self, state: State[Any]) -> State[Any] | None:
        # Imported here, because only a run that rewinds needs it.
        from jaxloop._checkpoint.reader import load_of_run

        self.writer.wait()
        return load_of_run(self.writer.path, state)

    def newest_name(self) -> tuple[int, str] | None:
        # Imported here, because only a run that fails needs it.
        from jaxloop._checkpoint.layout import entries

        with contextlib.suppress(CheckpointError):  # the one before it is named
            self.writer.wait()
        good = (one for one in entries(self.writer.path) if one.record is not None)
        return next(((one.step, str(one.folder)) for one in good), None)

    def newest_complete(self) -> str | None:
        return self.writer.newest_complete

    def close(self) -> None:
        self.writer.close()


@dataclasses.dataclass(frozen=True)
class _Criterion:
    """The decision whether to save a state. Its memory in ``handler_state`` is the best value."""

    name: str
    path: str
    criteria: str | None
    mode: Mode

    def _memory(self, state: State[Any]) -> tuple[str, Any]:
        """Returns the key and the value of the memory.

        Older checkpoints store the memory under the path as it was passed.
        """
        old = f"checkpoint_{self.path}"
        for key in (self.name, old):
            if key in state.handler_state:
                return key, state.handler_state[key]
        return self.name, None

    def open(self, start: RunStart) -> DecideFn:
        """Returns `decide` with the mode of one run. See `CheckpointTrigger.open`."""
        if self.criteria is None:
            return self.decide
        mode = resolved(self.mode, self.criteria, start)
        return dataclasses.replace(self, mode=mode).decide

    def decide(self, state: State[Any]) -> State[Any] | None:
        """Returns the state to save, or None. See `CheckpointTrigger.decide`."""
        if self.criteria is None:
            return state
        value = read_scalar(state, f"`{self.name}`", self.criteria)
        key, memory = self._memory(state)
        best = float("nan") if memory is None else float(memory["best"])
        if not is_better(value, best, self.mode, 0.0):
            return None
        memories = dict(state.handler_state)
        if key != self.name:
            del memories[key]
        memories[self.name] = {"best": np.float64(value), "step": state.step}
        return state.replace(handler_state=memories)

    def value(self, state: State[Any]) -> float | None:
        """Returns the value by which the state is the best, or None."""
        if self.criteria is None:
            return None
        _, memory = self._memory(state)
        is_best = memory is not None and memory.get("step") == state.step
        return float(memory["best"]) if is_best else None
