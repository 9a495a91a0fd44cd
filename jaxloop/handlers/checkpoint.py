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

from jaxloop.checkpoint import check_folder, load_latest
from jaxloop.errors import ArgumentError, ArgumentTypeError
from jaxloop.events import Status, as_events
from jaxloop.filters import as_filter
from jaxloop.handlers.monitor import Mode, better, check_mode, read
from jaxloop.loop import Attachment, EventLike, FilterLike, Loop
from jaxloop.state import PyTree, State
from jaxloop.store import Store


@dataclasses.dataclass(frozen=True)
class _Saver:
    name: str
    path: str
    criteria: str | None
    mode: Mode
    keep: int | None
    keep_best: int
    keep_every: int | None
    on_exception: bool
    file_pattern: Callable[[State], str] | None

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

    def open(self) -> _Saves:
        return _Saves(self)


class _Saves:
    """What a run writes to: see `jaxloop.loop.Saves`."""

    def __init__(self, saver: _Saver) -> None:
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


def attach_checkpoint(
    loop: Loop,
    path: str,
    event: EventLike,
    filter: FilterLike,
    criteria: str | None,
    mode: Mode,
    keep: int | None,
    keep_best: int,
    keep_every: int | None,
    on_exception: bool,
    file_pattern: Callable[[State], str] | None,
) -> Loop:
    """See `Loop.checkpoint`."""
    check_mode("checkpoint", mode)
    for name, count, least in (
        ("keep", keep, 1),
        ("keep_best", keep_best, 0),
        ("keep_every", keep_every, 1),
    ):
        if count is None and name != "keep_best":
            continue
        if isinstance(count, bool) or not isinstance(count, int):
            raise ArgumentTypeError(f"checkpoint: {name} must be a whole number, and is {count!r}")
        if count < least:
            raise ArgumentError(f"checkpoint: {name} must be at least {least}, and is {count}")
    path = os.fspath(path)
    saver = _Saver(
        f"checkpoint_{path}",
        path,
        criteria,
        mode,
        keep,
        keep_best,
        keep_every,
        on_exception,
        file_pattern,
    )
    return loop.attach(
        Attachment(
            as_events(event),
            saver,
            as_filter(filter),
            saver.name,
            kind="saver",
            watches=() if criteria is None else (criteria,),
            adds=(),
            open=saver.open,
            prepare=lambda run: check_folder(path, run.start is None and run.resume_path is None),
            reserved=True,
        )
    )
