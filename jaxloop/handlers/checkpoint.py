"""Saving the whole state while a run goes on.

    loop.checkpoint("runs/digits", criteria="validation_accuracy", mode="max", keep=3)

The decision is a handler's, at its turn; the save comes at the end of the firing, with the effects
of every handler, also of one that halted.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxloop._checkpoint.reader import check_folder, load_latest
from jaxloop._checkpoint.writer import Store
from jaxloop._core.checks import check_count
from jaxloop._core.events import Status, as_events
from jaxloop._core.filters import as_filter
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop._loop import Loop
from jaxloop._spec import Attachment, EventLike, FilterLike
from jaxloop.handlers.monitor import Mode, better, check_mode, read


@dataclasses.dataclass(frozen=True)
class Saver:
    """What `Loop.checkpoint` was asked for; it decides whether a firing saves."""

    path: str
    criteria: str | None
    mode: Mode
    keep: int | None
    keep_best: int
    keep_every: int | None
    on_exception: bool
    file_pattern: Callable[[State], str] | None

    @property
    def name(self) -> str:
        """Of the attachment, and of its memory in ``handler_state``."""
        return f"checkpoint_{self.path}"

    def __call__(self, state: State) -> tuple[bool, Any]:
        if self.criteria is None:
            return True, None
        value = read(state, f"`{self.name}`", self.criteria)
        memory = state.handler_state.get(self.name) or {"best": np.float64("nan")}
        if not better(value, float(memory["best"]), self.mode, 0.0):
            return False, None
        memory = {"best": np.float64(value), "step": state.step}
        changed = state.replace(handler_state={**state.handler_state, self.name: memory})
        return True, (Status.CONTINUE, changed)

    def prepare(self, loop: Loop) -> None:
        """Checks the folder before the first step."""
        check_folder(self.path, loop.start is None and loop.resume_path is None)

    def open(self) -> _Saves:
        """What a run writes to."""
        return _Saves(self)


class _Saves:
    """What a run writes to: see `jaxloop.loop.Saves`."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver
        self.on_exception = saver.on_exception
        self._store = Store(
            saver.path,
            keep=saver.keep,
            keep_best=saver.keep_best,
            keep_every=saver.keep_every,
        )

    def save(self, state: State) -> None:
        saver = self._saver
        name = str(state.step) if saver.file_pattern is None else saver.file_pattern(state)
        memory = state.handler_state.get(saver.name)
        best = memory is not None and memory.get("step") == state.step
        self._store.save(name, state, float(memory["best"]) if memory and best else None)

    def begin(self) -> None:
        self._store.begin()

    def poll(self) -> None:
        self._store.poll()

    def newest(self, like: PyTree) -> State | None:
        self._store.wait()
        return load_latest(self._store.path, like)

    def close(self) -> None:
        self._store.close()


def attach_checkpoint(loop: Loop, saver: Saver, event: EventLike, filter: FilterLike) -> Loop:
    """See `Loop.checkpoint`."""
    check_mode("checkpoint", saver.mode)
    for name, least in (("keep", 1), ("keep_best", 0), ("keep_every", 1)):
        count = getattr(saver, name)
        if count is not None or name == "keep_best":
            check_count(name, count, at_least=least, where="checkpoint")
    saver = dataclasses.replace(saver, path=os.fspath(saver.path))
    return loop.attach(
        Attachment(
            as_events(event),
            saver,
            as_filter(filter),
            saver.name,
            kind="saver",
            watches=() if saver.criteria is None else (saver.criteria,),
            adds=(),
            open=saver.open,
            prepare=saver.prepare,
            reserved=True,
        )
    )
