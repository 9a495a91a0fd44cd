"""Events, statuses, and the table that defines the order in which they happen.

    row = ROWS[Place.ITERATION_COMPLETED]
    row.next                      # Place.FETCH: where a run continues after that firing

A run is a walk over `ROWS`. The engine follows the table, and a saved state names the row that
comes next. Nothing else in the package defines the order.

Every firing of an event takes the same steps:

1. The event is counted (``event_counts``).
2. Its handlers run in the order in which they were attached, until one returns a status that halts.
3. At the end of an epoch, ``history`` gets the metrics, including those that the handlers added.
4. Requested saves are made. They include all changes by the handlers.
5. Its observers run, even if a handler halted.
6. The counters advance (`Row.ends_iteration`, `Row.ends_epoch`) and the walk goes to the next row.

``times`` is set before step 2 of an epoch's last event.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from jaxloop.errors import ArgumentTypeError, unknown_name


class Event(enum.StrEnum):
    """A point in a run at which handlers and observers can run. You can pass the string instead.

    Example:
        >>> Event("epoch_completed") is Event.EPOCH_COMPLETED
        True
    """

    STARTED = "started"
    EPOCH_STARTED = "epoch_started"
    ITERATION_STARTED = "iteration_started"
    ITERATION_COMPLETED = "iteration_completed"
    EPOCH_COMPLETED = "epoch_completed"
    EPOCH_HALTED = "epoch_halted"
    HALTED = "halted"
    COMPLETED = "completed"


EventName: TypeAlias = Literal[
    "started",
    "epoch_started",
    "iteration_started",
    "iteration_completed",
    "epoch_completed",
    "epoch_halted",
    "halted",
    "completed",
]
EventLike: TypeAlias = Event | EventName | Literal["all"] | Sequence[Event | EventName]
"""An event, its name, a list of them, or "all"."""


class Status(enum.StrEnum):
    """A handler's request to the loop. You can return the string instead.

    Example:
        >>> Status("halt_loop") is Status.HALT_LOOP
        True
    """

    CONTINUE = "continue"
    HALT_EPOCH = "halt_epoch"
    HALT_LOOP = "halt_loop"


StatusLike: TypeAlias = Status | Literal["continue", "halt_epoch", "halt_loop"]

RunStatus: TypeAlias = Literal["running", "completed", "halted", "interrupted"]
"""The possible values of `State.status`."""


class Place(enum.StrEnum):
    """The place of a run in the order of events: before a firing, or between two firings."""

    STARTED = "started"
    EPOCH_STARTED = "epoch_started"
    ITERATION_STARTED = "iteration_started"
    ITERATION_COMPLETED = "iteration_completed"
    EPOCH_COMPLETED = "epoch_completed"
    EPOCH_HALTED = "epoch_halted"
    HALTED = "halted"
    COMPLETED = "completed"
    NEXT_EPOCH = "next_epoch"
    """If another epoch remains, ``epoch_started`` follows, otherwise ``completed``."""
    FETCH = "fetch"
    """If the epoch has another iteration, ``iteration_started`` follows, otherwise
    ``epoch_completed``."""
    STEP = "step"
    """The step runs, and ``iteration_completed`` follows."""
    END = "end"
    """Nothing follows."""


class Row(NamedTuple):
    """The rules for the firing of one event, and the places that follow it.

    Attributes:
        event: The event that fires.
        in_epoch: Whether an epoch is running, which a handler may halt with `Status.HALT_EPOCH`.
        ends_iteration: Whether the iteration counter advances afterwards.
        ends_epoch: Whether ``times`` and ``history`` are written, and the epoch counter advances.
        next: What follows if no handler halted.
        next_if_halted: What follows if a handler halted the loop.
    """

    event: Event
    in_epoch: bool
    ends_iteration: bool
    ends_epoch: bool
    next: Place
    next_if_halted: Place


ROWS: dict[str, Row] = {
    row.event.value: row
    for row in (
        #   event                      in_epoch  ends iteration, epoch  next, next_if_halted
        Row(Event.STARTED, False, False, False, Place.NEXT_EPOCH, Place.HALTED),
        Row(Event.EPOCH_STARTED, True, False, False, Place.FETCH, Place.EPOCH_HALTED),
        Row(Event.ITERATION_STARTED, True, False, False, Place.STEP, Place.EPOCH_HALTED),
        Row(Event.ITERATION_COMPLETED, True, True, False, Place.FETCH, Place.EPOCH_HALTED),
        Row(Event.EPOCH_COMPLETED, False, False, True, Place.NEXT_EPOCH, Place.HALTED),
        Row(Event.EPOCH_HALTED, False, False, True, Place.NEXT_EPOCH, Place.HALTED),
        Row(Event.HALTED, False, False, False, Place.END, Place.END),
        Row(Event.COMPLETED, False, False, False, Place.END, Place.END),
    )
}

IN_EPOCH = frozenset({Place.FETCH, Place.ITERATION_STARTED, Place.STEP, Place.ITERATION_COMPLETED})
"""Places in the middle of an epoch, where a state has a position in that epoch's data."""

ITERATION_EVENTS = (Event.ITERATION_STARTED, Event.ITERATION_COMPLETED)
"""The events that fire inside a block."""

PER_RUN = (Event.STARTED, Event.COMPLETED, Event.HALTED)
"""Events that are counted per run. All others are counted over the lifetime of the state."""

_ALL = "all"


def as_events(event: object) -> tuple[Event, ...]:
    """Returns the events that ``event`` names: one, a list of them, or "all".

    Raises:
        UnknownNameError: A name is not the name of an event.
        ArgumentTypeError: ``event`` is neither an event nor a list of them.

    Example:
        >>> as_events("started")
        (<Event.STARTED: 'started'>,)
    """
    if isinstance(event, str):
        if event == _ALL:
            return tuple(Event)
        try:
            return (Event(event),)
        except ValueError:
            raise unknown_name("event", str(event), [*Event, _ALL]) from None
    if isinstance(event, list | tuple) and event:
        return tuple(dict.fromkeys(one for item in event for one in as_events(item)))
    raise ArgumentTypeError(
        f"event must be an event, its name or a list of them, got {event!r}",
        fix="pass an event such as jl.Event.EPOCH_COMPLETED or 'epoch_completed'",
    )
