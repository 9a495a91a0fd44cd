"""A record of what a run is doing, so that an error can say where it happened.

    activity = Activity()
    activity.now = ("while reading the data of epoch {}", epoch)
    str(activity)                           # formatted only on demand
    activity = TracedActivity()             # if a handler records a profile

It is assigned several times in each block, so it is a tuple and not a formatted string.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxloop._core.state import State

CALLING = "in {} `{}` on {}, epoch {}, iteration {}"
"""The template while a handler or an observer runs: its kind, its name, and where it is called."""

READING = "while reading the data of epoch {} from iteration {} on"
"""The template while a block gets its batches."""

STEPPING = "in the step, epoch {}, iterations {} to {}"
"""The template while a block is dispatched."""

WAITING = "in the step, near epoch {}, iteration {}"
"""The template while earlier blocks run."""

SAVING = "while saving at {}"
"""The template while a state is saved."""


def _no_state() -> State | None:
    return None


class Activity:
    """A record of what a run is doing.

    Attributes:
        now: A template and its arguments.
        first_state: Until the run begins, returns the state that it will begin with, if it exists.
    """

    __slots__ = ("first_state", "now")

    def __init__(self) -> None:
        self.now: tuple[object, ...] = ("while making the first state",)
        self.first_state: Callable[[], State | None] = _no_state

    def begin(self) -> None:
        """Forgets the first state, so that nothing keeps its arrays during the run."""
        self.first_state = _no_state

    def __str__(self) -> str:
        template, *arguments = self.now
        return str(template).format(*arguments)


class TracedActivity(Activity):
    """An activity that a profile shows: what the run does is an annotation until it changes.

    An annotation costs about a microsecond while no profile is recorded. So only a run in which a
    handler may record one has such an activity.
    """

    __slots__ = ("_annotation", "_now")

    def __init__(self) -> None:
        self._annotation: jax.profiler.TraceAnnotation | None = None
        super().__init__()

    @property
    def now(self) -> tuple[object, ...]:
        """See `Activity`."""
        return self._now

    @now.setter
    def now(self, now: tuple[object, ...]) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
        self._now = now
        self._annotation = _annotation(*now)
        self._annotation.__enter__()


def _annotation(template: object, *arguments: object) -> jax.profiler.TraceAnnotation:
    if template == STEPPING:
        epoch, first, last = arguments
        # With this kind, a viewer attributes the work of the device to the block.
        name = f"step: epoch {epoch}, iterations {first} to {last}"
        return jax.profiler.StepTraceAnnotation(name, step_num=first)
    names = {
        CALLING: "{0}: {1}",
        READING: "data",
        WAITING: "wait for the device",
        SAVING: "save",
    }
    name = names.get(str(template), "run").format(*arguments)
    return jax.profiler.TraceAnnotation(name)
