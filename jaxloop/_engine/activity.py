"""A record of what a run is doing, so that an error can say where it happened.

    activity = Activity()
    activity.now = ("while reading the data of epoch {}", epoch)
    str(activity)                           # formatted only on demand

It is assigned several times in each block, so it is a tuple and not a formatted string.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxloop._core.state import State

CALLING = "in {} `{}` on {}, epoch {}, iteration {}"
"""The template while a handler or an observer runs: its kind, its name, and where it is called."""


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
        """Forgets the first state, so that nothing keeps its arrays while the run goes on."""
        self.first_state = _no_state

    def __str__(self) -> str:
        template, *arguments = self.now
        return str(template).format(*arguments)
