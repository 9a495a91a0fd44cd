"""Saving the whole state while a run goes on.

    loop.checkpoint("runs/digits", criteria="validation_accuracy", mode="max", keep=3)

The decision is a handler's, at its turn; the save comes at the end of the firing, with the effects
of every handler, also of one that halted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxloop.checkpoint import Store, check_writable, opened
from jaxloop.errors import ArgumentError, ArgumentTypeError
from jaxloop.events import Status, as_events
from jaxloop.filters import as_filter
from jaxloop.handlers.monitor import Mode, better, check_mode, read
from jaxloop.loop import Attachment, EventLike, FilterLike, Loop
from jaxloop.state import State


@dataclasses.dataclass(frozen=True)
class _Saver:
    name: str
    path: str
    criteria: str | None
    mode: Mode
    keep: int | None
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

    @contextlib.contextmanager
    def commit(self) -> Iterator[Callable[[State], None]]:
        make = lambda: Store(self.path, self.keep, lambda a, b: better(a, b, self.mode, 0.0))  # noqa: E731
        with opened(make) as store:

            def save(state: State) -> None:
                name = str(state.step) if self.file_pattern is None else self.file_pattern(state)
                memory = state.handler_state.get(self.name)
                now = memory is not None and memory.get("step") == state.step
                store.save(name, state, float(memory["best"]) if memory and now else None)

            yield save


def attach_checkpoint(
    loop: Loop,
    path: str,
    event: EventLike,
    filter: FilterLike,
    criteria: str | None,
    mode: Mode,
    keep: int | None,
    file_pattern: Callable[[State], str] | None,
) -> Loop:
    """See `Loop.checkpoint`."""
    check_mode("checkpoint", mode)
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int)):
        raise ArgumentTypeError(f"checkpoint: keep must be an int or None, and is {keep!r}")
    if keep is not None and keep < 1:
        raise ArgumentError(f"checkpoint: keep must be at least 1, and is {keep}")
    path = os.fspath(path)
    saver = _Saver(f"checkpoint_{path}", path, criteria, mode, keep, file_pattern)
    return loop.attach(
        Attachment(
            as_events(event),
            saver,
            as_filter(filter),
            saver.name,
            kind="saver",
            watches=() if criteria is None else (criteria,),
            adds=(),
            commit=saver.commit,
            prepare=lambda _: check_writable(path),
            reserved=True,
        )
    )
