"""A record of what a run is doing, so that an error can say where it happened.

    activity = Activity()
    activity.now = ("while reading the data of epoch {}", epoch)
    str(activity)                           # formatted only on demand

It is assigned several times in each block, so it is a tuple and not a formatted string.
"""

from __future__ import annotations

CALLING = "in {} `{}` on {}, epoch {}, iteration {}"
"""The template while a handler or an observer runs: its kind, its name, and where it is called."""


class Activity:
    """A record of what a run is doing.

    Attributes:
        now: A template and its arguments.
    """

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now: tuple[object, ...] = ("while making the first state",)

    def __str__(self) -> str:
        template, *arguments = self.now
        return str(template).format(*arguments)
