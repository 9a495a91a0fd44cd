"""Firing: the steps of one event, in the order that `jaxloop._core.events` defines.

    firing.fire(ROWS[Place.EPOCH_STARTED])
    firing.fire(ROWS[Place.HALTED], then=progress.place)

If a handler raises, all changes by the handlers of this firing are undone. A run that resumes after
the error repeats the firing.
"""

from __future__ import annotations

import contextlib
import logging

from jaxloop._core.arrays import (
    as_state,
    cast_numbers,
    changed_leaves,
    describe_change,
    state_signature,
)
from jaxloop._core.checks import in_words
from jaxloop._core.events import ITERATION_EVENTS, Event, Place, Row, Status
from jaxloop._core.lazy import Constant, LazyDict
from jaxloop._core.state import State
from jaxloop._engine.activity import CALLING, SAVING
from jaxloop._engine.attached import Attached
from jaxloop._engine.clock import now
from jaxloop._engine.parts import Parts
from jaxloop._engine.recovery import Recovery
from jaxloop._engine.watched import Watched
from jaxloop._program.metric_rows import MetricRow, PendingRows
from jaxloop._spec import Acting, CheckpointTrigger, Guard
from jaxloop.errors import HaltError, HandlerReturnError

logger = logging.getLogger("jaxloop")

_EPOCHS_UNSETTLED, _EPOCHS_PENDING = 2, 64
"""The number of epochs whose metrics the device may still have to compute, and the number of those
whose metrics the host has not computed yet."""


class Firing:
    """The part of a run that runs handlers and passes their requests to the other parts.

    Args:
        parts: The parts of the run.
        recovery: Handles the requests of guards.

    Attributes:
        silent: Iteration events to which nothing is attached. They are only counted.
    """

    def __init__(self, parts: Parts, recovery: Recovery) -> None:
        self._parts, self._recovery = parts, recovery
        self._debug = parts.options.debug
        acting = [Attached(one) for one in parts.spec.acting()]
        self._by_event: dict[Event, list[Attached[Acting]]] = {
            event: [one for one in acting if event in one.attachment.events] for event in Event
        }
        self.silent = frozenset(
            event
            for event in ITERATION_EVENTS
            if not self._debug and not self._by_event[event] and event not in parts.observers.events
        )
        self._unsettled: list[LazyDict] = []
        self._pending = PendingRows(parts.clock.wait)
        self._watched = Watched(parts.spec)

    def fire(self, row: Row, *, then: Place | None = None, handlers: bool = True) -> None:
        """Fires an event.

        Args:
            row: The row of the event.
            then: If given, it replaces the next place of the table.
            handlers: Whether its handlers run. Saves and observers always do.
        """
        parts, event = self._parts, row.event
        progress = parts.progress
        progress.event = event
        progress.place = row.next if then is None else then
        if event is Event.EPOCH_HALTED and progress.status == "halted":
            progress.place = row.next_if_halted
        if event is Event.COMPLETED:
            progress.status = "completed"
        if row.ends_epoch:
            clock = parts.blocks.end_epoch_clock()
            progress.lazy_times = progress.lazy_times.added(progress.epoch, clock)
        if self._debug:
            logger.info("%s: epoch %d, iteration %d", event, progress.epoch, progress.iteration)
        quiet = parts.blocks.quiet and event in ITERATION_EVENTS
        if handlers and self._by_event[event] and not quiet:
            self._handle(row, event if then is None else then)
        else:
            progress.count(event)
        if row.ends_epoch:
            clock.poll()  # most handlers of this event have waited for the device
            self._keep_metrics()
        ending = event in (Event.COMPLETED, Event.HALTED)
        observed = event in parts.observers.events
        if parts.savers.requested or (ending and parts.savers.open_stores):
            if parts.observers.synced:
                self._sync_and_save(event if observed else None, ending=ending)
                observed = False
            else:
                self._save(ending=ending)
        if observed:
            parts.observers.queue_firing(event)
        if event is Event.COMPLETED:
            self._watched.warn()
        if not row.ends_epoch:
            progress.leave(row)

    def _keep_metrics(self) -> None:
        """Adds the epoch's metrics to the history, without waiting for them."""
        progress = self._parts.progress
        metrics = progress.lazy_metrics
        progress.lazy_history = progress.lazy_history.added(progress.epoch, metrics)
        if isinstance(metrics, MetricRow):
            if self._pending.add(metrics):
                if len(self._pending) > _EPOCHS_PENDING:
                    self._pending.compute(but=_EPOCHS_UNSETTLED)
                return
            metrics.settle()
        self._unsettled.append(metrics)
        if len(self._unsettled) > _EPOCHS_UNSETTLED:
            self._unsettled.pop(0).get()

    def _sync_and_save(self, event: Event | None, *, ending: bool) -> None:
        """Lets the observers make durable what they see up to here, and saves then.

        A run that resumes from what is saved does not show them this firing again.
        """
        observers = self._parts.observers
        try:
            if event is not None:
                observers.queue_firing(event)
            observers.flush()
            self._parts.activity.now = ("while observers write at {}", self._parts.progress.event)
            began = now()
            observers.sync()
            self._parts.clock.epoch.handlers_s += now() - began
        except Exception:
            self._save(ending=ending)
            raise
        self._save(ending=ending)

    def _save(self, *, ending: bool) -> None:
        parts = self._parts
        parts.activity.now = (SAVING, parts.progress.event)
        those = [one for one, _ in parts.savers.open_stores] if ending else parts.savers.requested
        began = now()
        parts.savers.save(parts.state(), ending=ending)
        parts.carry.reclaim()
        parts.savers.begin()
        # Triggers with the same folder share one save, so the first stands for all.
        parts.clock.add("saves_s", those[0].name, now() - began)

    # --- handlers ------------------------------------------------------------------------------

    def _handle(self, row: Row, place_after_error: Place | Event) -> None:
        """Runs the handlers of a firing. An exception undoes the whole firing."""
        parts, progress = self._parts, self._parts.progress
        total, epoch = progress.firings[row.event]
        due = self._due(row.event, total + 1, epoch + 1)
        if not due:
            progress.count(row.event)
            return
        before, carried = progress.copy(), parts.carry.values
        progress.count(row.event)
        try:
            if parts.observers.queue:
                parts.observers.flush()
            self._run_all(row, due)
        except BaseException:
            progress.restore(before)
            progress.place = Place(place_after_error)
            parts.carry.set(*carried)
            parts.savers.requested = []
            raise
        parts.carry.reclaim()

    def _due(self, event: Event, total: int, epoch: int) -> list[Attached[Acting]]:
        """Returns the handlers that run now, and those whose filter needs the state to decide."""
        began_s = self._parts.clock.began_s
        due = []  # a loop, because a comprehension is one more call
        for one in self._by_event[event]:
            if one.asks or one.admits(total, epoch, began_s):
                due.append(one)
        return due

    def _run_all(self, row: Row, due: list[Attached[Acting]]) -> None:
        parts = self._parts
        total, epoch = parts.progress.firings[row.event]
        activity = parts.activity
        at = (row.event, parts.progress.epoch, parts.progress.iteration)
        state = parts.state()
        for attached in due:
            one = attached.attachment
            activity.now = (CALLING, "handler", one.name, *at)
            if attached.asks and not attached.admits(
                total, epoch, parts.clock.began_s, Constant(state).get
            ):
                continue
            if self._watched.is_waiting(one, state):
                if self._debug:
                    logger.info("handler %s waits for a metric that it watches", one.name)
                continue
            if attached.timed:
                attached.mark()
            began, parts.clock.waited_s = now(), 0.0
            status, state = self._run(one, state, row.event)
            took_s = now() - began
            parts.clock.add(attached.part, one.name, took_s)
            if self._debug:
                logger.info("handler %s took %.6f s", one.name, took_s)
            if status is not Status.CONTINUE:
                self._halt(row, status, one.name)
                return

    def _run(self, one: Acting, state: State, event: Event) -> tuple[Status, State]:
        """Runs one attachment, and returns its status and the new state."""
        if isinstance(one, CheckpointTrigger):
            saved = self._parts.deciding.get(id(one), one.decide)(state)
            if saved is None:
                return Status.CONTINUE, state
            self._parts.savers.request(one)
            return Status.CONTINUE, self._adopt(state, saved, one.name)
        if isinstance(one, Guard):
            problem = one.inspect(state)
            if problem is None:
                return Status.CONTINUE, state
            rewound = self._recovery.rescue(one, problem)
            return (Status.CONTINUE if rewound else Status.HALT_LOOP), self._parts.state()
        result = self._parts.opened.get(id(one), one.fn)(state)
        if result is None:
            return Status.CONTINUE, state
        status, changed = _checked(result, one.name, event)
        return status, self._adopt(state, changed, one.name)

    def _halt(self, row: Row, status: Status, name: str) -> None:
        progress = self._parts.progress
        if status is Status.HALT_EPOCH:
            if not row.in_epoch:
                raise HaltError(
                    f"handler `{name}` on {row.event} returned halt_epoch, but no epoch is running "
                    "there",
                    fix="return (jl.Status.HALT_LOOP, state), or attach it to an iteration event",
                )
            progress.place = Place.EPOCH_HALTED
        elif row.event not in (Event.HALTED, Event.COMPLETED):
            progress.status, progress.halted_by = "halted", name
            progress.place = row.next_if_halted

    def _adopt(self, old: State, new: State, name: str) -> State:
        """Applies the changes of a handler, and returns the new state."""
        if new is old:
            return old
        parts = self._parts
        parts.progress.adopt(old, new, name, parts.blocks.metric_names)
        if new.loan is not old.loan:
            self._change_step_state(new.loan.step_state, name)
        return parts.state()

    def _change_step_state(self, changed: object, name: str) -> None:
        carry = self._parts.carry
        old = carry.step_state
        changed = as_state(cast_numbers(changed, old), f"handler `{name}`: state.step_state")
        if state_signature(changed) != state_signature(old):
            self._parts.blocks.recompile(
                changed,
                f"handler `{name}` changed the structure, a shape or a dtype of the step state, so "
                f"the step recompiles: {describe_change(old, changed)}",
            )
            progress = self._parts.progress
            paths = dict.fromkeys((*progress.reshaped, *changed_leaves(old, changed)))
            progress.reshaped = tuple(paths)
        # Copied, because the handler may keep its arrays, and the old state the accumulators.
        carry.set_copy(changed, carry.values[1])


def _checked(result: object, name: str, event: Event) -> tuple[Status, State]:
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], State):
        with contextlib.suppress(ValueError):
            return Status(result[0]), result[1]
    raise HandlerReturnError(
        f"handler `{name}` on {event} must return None or (status, state), got {in_words(result)}",
        fix="return None to continue, or (jl.Status.HALT_LOOP, state) to stop",
    )
