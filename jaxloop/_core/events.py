"""Events, statuses and the one table that says in which order things happen.

    row = ROWS["iteration_completed"]
    row.next                      # "fetch": where a run goes on after that firing

A run is a walk over `ROWS`. The driver walks it, a saved state names the row that comes next, and
nothing else in the package knows the order.

Every firing goes through the same steps, in this order:

1. the event is counted (``event_counts``);
2. its handlers run, in the order they were attached, until one returns a status that halts;
3. at the end of an epoch, ``history`` gets the metrics, with what the handlers added;
4. what asked to be saved is saved, with all effects of the handlers;
5. its observers run, also where a handler halted;
6. the counters move on (`Row.leave`), and the walk goes to the next row.

``times`` is set before step 2 of an epoch's last event.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from jaxloop.errors import ArgumentTypeError, unknown_name


class Event(enum.StrEnum):
    """What happens in a run; wherever an `Event` is taken, its string is taken too.

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


class Status(enum.StrEnum):
    """What a handler may ask for; its string is taken too.

    Example:
        >>> Status("halt_loop") is Status.HALT_LOOP
        True
    """

    CONTINUE = "continue"
    HALT_EPOCH = "halt_epoch"
    HALT_LOOP = "halt_loop"


class Row(NamedTuple):
    """One firing: what is special about it and where it leads.

    Attributes:
        event: The event that fires.
        in_epoch: Whether an epoch is running, so that `Status.HALT_EPOCH` has a meaning.
        ends_epoch: Whether ``times`` and ``history`` are written here.
        leave: The counter that moves on when the row is left: "iteration", "epoch" or None.
        next: The row that follows when nothing halted.
        next_if_halted: The row that follows once the loop is halted.
    """

    event: Event
    in_epoch: bool
    ends_epoch: bool
    leave: str | None
    next: str
    next_if_halted: str


STEP = "step"
"""Not a firing: the step runs, and ``iteration_completed`` follows."""


FETCH = "fetch"
"""Not a firing: is there another iteration in this epoch? ``iteration_started`` or
``epoch_completed``."""


NEXT_EPOCH = "next_epoch"
"""Not a firing: is there another epoch? ``epoch_started`` or ``completed``."""


END = "end"
"""Nothing comes next."""


ROWS: dict[str, Row] = {
    row.event.value: row
    for row in (
        #   event                    in_epoch ends  leave       next           next_if_halted
        Row(Event.STARTED, False, False, None, NEXT_EPOCH, "halted"),
        Row(Event.EPOCH_STARTED, True, False, None, FETCH, "epoch_halted"),
        Row(Event.ITERATION_STARTED, True, False, None, STEP, "epoch_halted"),
        Row(Event.ITERATION_COMPLETED, True, False, "iteration", FETCH, "epoch_halted"),
        Row(Event.EPOCH_COMPLETED, False, True, "epoch", NEXT_EPOCH, "halted"),
        Row(Event.EPOCH_HALTED, False, True, "epoch", NEXT_EPOCH, "halted"),
        Row(Event.HALTED, False, False, None, END, END),
        Row(Event.COMPLETED, False, False, None, END, END),
    )
}


PER_RUN = (Event.STARTED, Event.COMPLETED, Event.HALTED)
"""Events whose counts start anew with each run; all others count over the life of the state."""


ALL = "all"


def as_events(event: object) -> tuple[Event, ...]:
    """The events that ``event`` names: one, a list of them, or "all".

    Example:
        >>> as_events("started")
        (<Event.STARTED: 'started'>,)
    """
    if isinstance(event, str):
        if event == ALL:
            return tuple(Event)
        try:
            return (Event(event),)
        except ValueError:
            raise unknown_name("event", str(event), [*Event, ALL]) from None
    if isinstance(event, list | tuple) and event:
        return tuple(dict.fromkeys(one for item in event for one in as_events(item)))
    raise ArgumentTypeError(
        f"event must be an event, its name or a list of them, and is {event!r}",
        fix="use for example jl.Event.EPOCH_COMPLETED or 'epoch_completed'",
    )
