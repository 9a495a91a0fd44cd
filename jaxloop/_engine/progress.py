"""`Progress`, the mutable form of `State` during a run.

    progress = Progress(Bounds(3, None, None))
    progress.count(Event.EPOCH_STARTED)
    before = progress.copy()
    state = progress.to_state(carry.lend, position, elapsed_s)
    progress.restore(before)                # undoes every change

`State` declares the fields. Only `to_state` makes the state of a run, and only `from_state`
continues from one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxloop._core.bounds import Bounds
from jaxloop._core.events import ITERATION_EVENTS, PER_RUN, Event, Place, Row
from jaxloop._core.lazy import LazyDict, ReadOnlyDict
from jaxloop._core.state import (
    NO_COUNTS,
    STATE_ONLY,
    EventCounts,
    Loan,
    Snapshot,
    State,
    fields_by_change,
    make,
)
from jaxloop._program.metric_rows import MetricRow
from jaxloop.errors import StructureError

_STARTED, _COMPLETED = ITERATION_EVENTS
_REFUSED = fields_by_change("refuse")
_ADOPTED = fields_by_change("adopt")
# Fields of the run itself, not of the state that it continues from.
_OF_THE_RUN = ("max_iteration", "status", "halted_by", "loan", "position")


class Progress(State[Any]):
    """The only mutable `State`.

    Attributes:
        firings: ``{event: (total, within the epoch)}``.
        added: Metrics of this epoch that handlers added, which no accumulator holds.
    """

    firings: dict[Event, tuple[int, int]]
    added: Mapping[str, Any]

    # `Snapshot` checks each assignment. `Progress` is mutable and must be fast, so it does not.
    __setattr__ = object.__setattr__  # type: ignore[assignment]  # a method of `object`

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(max_iteration=bounds.iterations)
        self._set_bounds(bounds)
        self.firings = dict(NO_COUNTS)
        self.added = {}

    def _set_bounds(self, bounds: Bounds) -> None:
        self.max_epoch = self.requested_epochs = bounds.epochs
        self.max_step, self.requested_iterations = bounds.steps, bounds.iterations

    # --- counting ------------------------------------------------------------------------------

    def count(self, event: Event) -> None:
        """Counts a firing."""
        total, epoch = self.firings[event]
        self.firings[event] = (total + 1, epoch + 1)

    def advance(self, iterations: int) -> None:
        """Counts the iterations of a block. Its first start has fired, its last end has not."""
        self.step += iterations
        self.iteration += iterations - 1
        if iterations > 1:
            for event in ITERATION_EVENTS:
                total, epoch = self.firings[event]
                self.firings[event] = (total + iterations - 1, epoch + iterations - 1)
        self.place = Place.ITERATION_COMPLETED

    def has_epoch(self) -> bool:
        """Returns whether the next epoch, with the number `epoch`, is part of the run."""
        return Bounds(self.max_epoch, None, self.max_step).has_epoch(self.epoch, self.step)

    def begin_epoch(self, max_iteration: int | None) -> None:
        """Begins an epoch."""
        self.firings = {event: (total, 0) for event, (total, _) in self.firings.items()}
        self.max_iteration = max_iteration

    def leave(self, row: Row) -> None:
        """Advances the counters after a firing."""
        if row.ends_iteration:
            self.event = None
            self.iteration += 1
        elif row.ends_epoch:
            self.event = None
            self.epoch, self.iteration = self.epoch + 1, 0

    def pass_by(self, row: Row) -> None:
        """Counts the firing of an event without attachments, and advances the counters."""
        total, epoch = self.firings[row.event]
        self.firings[row.event] = (total + 1, epoch + 1)
        self.place = row.next
        self.event = row.event
        if row.ends_iteration:
            self.event = None
            self.iteration += 1

    def set_metrics(self, metrics: LazyDict, declared: tuple[str, ...]) -> None:
        """Replaces the metrics of the epoch, and finds those that handlers added."""
        self.lazy_metrics = metrics
        if isinstance(metrics, MetricRow):
            self.added = dict(metrics.extra)  # without computing the others
        else:
            self.added = {n: v for n, v in metrics.get().items() if n not in declared}

    # --- states --------------------------------------------------------------------------------

    def copy(self) -> dict[str, Any]:
        """Returns a copy of the fields, for `restore`."""
        return {**self.__dict__, "firings": dict(self.firings)}

    def restore(self, before: dict[str, Any]) -> None:
        """Undoes every change since the copy was made."""
        self.__dict__.update(before)

    def to_snapshot(self) -> dict[str, Any]:
        """Returns the fields of a `Snapshot`."""
        fields = self.__dict__.copy()
        fields["counts"] = EventCounts(fields.pop("firings").copy())
        fields["lazy_sessions"] = self.lazy_sessions.at(self.step)
        del fields["added"]
        for name in STATE_ONLY:
            del fields[name]
        return fields

    def to_state(self, lend: Callable[[], Loan], position: object, elapsed_s: float) -> State[Any]:
        """Returns the state.

        Args:
            lend: Lends the arrays of the carry.
            position: The position in the data.
            elapsed_s: The seconds that this epoch has taken.
        """
        fields = self.__dict__.copy()
        fields["counts"] = EventCounts(fields.pop("firings").copy())
        fields["lazy_sessions"] = self.lazy_sessions.at(self.step)
        del fields["added"]
        fields["loan"], fields["position"], fields["elapsed_s"] = lend(), position, elapsed_s
        state: State[Any] = make(State, fields)
        return state

    def from_state(self, state: State[Any], bounds: Bounds) -> None:
        """Continues from a state of an earlier run, to the bounds of this one."""
        for name, value in vars(state).items():
            if name not in _OF_THE_RUN:
                setattr(self, name, value)
        self.firings = {**NO_COUNTS, **state.event_counts, **dict.fromkeys(PER_RUN, (0, 0))}
        self.handler_state = ReadOnlyDict(state.handler_state)
        self._set_bounds(bounds)

    def adopt(self, old: State[Any], new: State[Any], who: str, declared: tuple[str, ...]) -> None:
        """Applies the changes of a handler, except those to the step state.

        Raises:
            StructureError: The handler changed a counter.
        """
        for name in _REFUSED:
            if getattr(new, name) is not getattr(old, name):
                shown = {"counts": "event_counts"}.get(name, name)
                was, became = getattr(old, shown), getattr(new, shown)
                if was != became:
                    raise StructureError(
                        f"handler `{who}` changed state.{shown} from {was!r} to {became!r}, but "
                        "only the engine may change counters",
                        fix="change only step_state, metrics, handler_state, history, times or "
                        "max_epoch",
                    )
        for name in _ADOPTED:
            value = getattr(new, name)
            if value is getattr(old, name) or (name == "max_epoch" and value is None):
                continue
            if name == "lazy_metrics":
                self.set_metrics(value, declared)
            else:
                setattr(self, name, value)


assert set(_OF_THE_RUN) <= set(Snapshot.__annotations__) | set(State.__annotations__)
