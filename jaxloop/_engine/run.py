"""The driver: the only mutable loop, and the only clock.

    run = Run(loop, data, init_state, epochs=3, ...)
    for state in run.states():      # one an epoch
        ...
    run.output(None)

It walks the rows of `jaxloop.events`. Between two handlers it runs compiled blocks. Whoever
watches, the blocks are the same program: only their lengths differ. It runs ahead of the device,
by at most `BLOCKS_IN_FLIGHT` blocks, and looks at a value only where somebody asked for it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxloop._core import filters
from jaxloop._core import schedule as plan
from jaxloop._core.arrays import as_state, copy, put, state_signature, structure
from jaxloop._core.batch import Batch, Signature, signature_change
from jaxloop._core.checks import check_count, check_fuse, jit_options
from jaxloop._core.events import END, FETCH, NEXT_EPOCH, PER_RUN, ROWS, STEP, Event, Status
from jaxloop._core.events import Row as EventRow
from jaxloop._core.filters import Firing
from jaxloop._core.interrupts import Interrupted, Signals
from jaxloop._core.lazy import Known, Lazy, ReadOnlyDict, Records
from jaxloop._core.placement import placement
from jaxloop._core.state import Cell, Snapshot, State
from jaxloop._core.step_result import split_emission
from jaxloop._core.types import PyTree
from jaxloop._data.position import NOWHERE
from jaxloop._data.prefetch import KEPT, PATIENCE_S, Feed
from jaxloop._engine.clock import EpochClock, now
from jaxloop._engine.observers import Noticed, Observers, due
from jaxloop._engine.report import Report, check_metrics
from jaxloop._loop import Loop
from jaxloop._program.block import Output, Program
from jaxloop._program.metric_rows import Row, Rows
from jaxloop._spec import Attachment, PreparedInit, Saves
from jaxloop.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    HaltError,
    HandlerReturnError,
    RecompilationError,
    StructureError,
)

logger = logging.getLogger("jaxloop")


BLOCKS_IN_FLIGHT = 2


SIGNATURES_BEFORE_WARNING = 3


ITERATION_EVENTS = {Event.ITERATION_STARTED, Event.ITERATION_COMPLETED}


IN_EPOCH = (FETCH, Event.ITERATION_STARTED, STEP, Event.ITERATION_COMPLETED)
"""Where a state may go on in the middle of an epoch."""


SHORT_BLOCK_S, LONG_BLOCK_S, SPAN_FACTOR = 0.03, 0.5, 64
"""How many iterations a block has is also a matter of how long it takes: what waits for its end is
a log, an interrupt, a filter that asks a clock. A program's first block is one iteration; one that
takes less than the one time is followed by longer ones, one that takes more than the other by
shorter ones."""


HORIZON = 1024
"""How many iterations ahead the handlers are looked at."""


WATCHED_ITERATIONS = 4096
"""The longest block whose every iteration may be looked at."""


EPOCHS_UNSETTLED = 2
"""Epochs whose metrics may still be on the device."""


class Run:
    """One run of a loop. It is used once."""

    def __init__(
        self,
        loop: Loop,
        data: Any,
        init_state: PyTree,
        epochs: int,
        iterations: int | None,
        jit: bool | Mapping[str, Any],
        fuse: int | str,
        strict: bool,
        debug: bool,
    ) -> None:
        check_count("epochs", epochs, at_least=0)
        if iterations is not None:
            check_count("iterations", iterations, at_least=1)
        check_fuse(fuse)
        self.options = jit_options(jit)
        self.loop, self.iterations, self.strict = loop, iterations, strict
        self.jit, self.fuse = jit, fuse
        self.log = logger.info if debug else _silent
        self.signals = Signals()
        self.feed = Feed(data, epochs=epochs, iterations=iterations, signals=self.signals)
        self.handlers = [a for a in loop.attachments if a.kind != "observer"]
        self.observers = Observers([a for a in loop.attachments if a.kind == "observer"])
        self.watches = [plan.Watch(e, a.filter) for a in self.handlers for e in a.events]
        self.timed = any(filters.timed(a.filter) for a in loop.attachments)
        watched = {event for a in loop.attachments for event in a.events}
        self._unwatched = ITERATION_EVENTS - watched
        if debug:
            self._unwatched = set()

        self.max_epoch = epochs
        self.max_iteration: int | None = iterations
        self.epoch = self.iteration = self.step = 0
        self.history, self.times = Records(), Records()
        self.counts: dict[Event, tuple[int, int]] = {event: (0, 0) for event in Event}
        self.handler_state: ReadOnlyDict = ReadOnlyDict()
        self.status: str = "running"
        self.halted_by: str | None = None
        self.event: Event | None = None
        self.outputs: PyTree = {}
        self.place = NEXT_EPOCH
        self.carry: tuple[PyTree, PyTree] = ({}, {})
        self.metrics = Lazy(dict)
        self.extra: Mapping[str, Any] = {}
        self.program: Program | None = None
        self.sample: Batch | None = None
        self.ended: State | None = None

        self._cell: Cell | None = None
        self._wanted: list[Attachment] = []
        self._saves: list[tuple[Attachment, Saves]] = []
        # Iterations at which, as was found already, no handler runs; the next may.
        self._free = 0
        # Blocks that the device may not have done yet, and the clock of an epoch that ends there.
        self._flight: collections.deque[_Flying] = collections.deque()
        self._unsettled: collections.deque[Lazy] = collections.deque()
        self._signatures: set[Signature] = set()
        self._warned: set[str] = set()
        self._doing: tuple[Any, ...] = ("while making the first state",)
        self._landed = 0.0
        self._began = now()
        self.clock = EpochClock()
        self._ran: dict[int, float] = {}
        self._prepare(init_state)

    # --- before the first event ----------------------------------------------------------------

    def _prepare(self, init_state: PyTree) -> None:
        """Makes or attaches the state, and checks what can be known now."""
        check_metrics(self.loop)
        if not self.feed.keeps_position and any(one.open is not None for one in self.handlers):
            raise DataError(
                "checkpoint: the data are a one-shot iterator, whose position cannot be kept: a "
                "run that was killed could not go on",
                fix=KEPT,
            )
        for one in self.loop.attachments:
            if one.prepare is not None:
                one.prepare(self.loop)
        state = self.loop.start
        if state is None and self.loop.resume_path is not None:
            state = self._resumed(init_state)
        if state is None:
            self._first(init_state)
        else:
            self._attach(state)
        self._specialize()

    def _read_sample(self) -> Batch:
        self.max_iteration = self.feed.open(0, 0)
        sample = self.feed.sample()
        if sample is None:
            raise DataError(
                "run: the data are empty: they gave no batch", fix="pass at least one batch"
            )
        return sample

    def _first(self, init_state: PyTree) -> None:
        self.sample = self._read_sample()
        self.carry = (self._init(self.sample, init_state), {})

    def _init(self, sample: Batch, init_state: PyTree) -> PyTree:
        loop = self.loop
        if loop.init_fn is None:
            return copy(as_state({} if init_state is None else init_state, "run(init_state=)"))
        jit = self.options is not None
        if isinstance(loop.init_fn, PreparedInit):
            init = loop._programs.init(loop.init_fn.fn, jit)
            prepared = loop.init_fn.prepare(init_state)
            state, evidence = init(put(sample.value), put(prepared))
            loop.init_fn.check(evidence)
        else:
            init = loop._programs.init(loop.init_fn, jit)
            state, _ = split_emission(init(put(sample.value), put(init_state)))
        return copy(as_state(state, "what init_fn returned"))

    def _resumed(self, init_state: PyTree) -> State | None:
        from jaxloop._checkpoint.reader import load_latest

        assert self.loop.resume_path is not None
        sample = self._read_sample()
        like = self._init(sample, init_state)
        state = load_latest(self.loop.resume_path, like)
        if state is None:
            self.sample, self.carry = sample, (like, {})
        else:
            self.feed.close_epoch()
        return state

    def _attach(self, state: State) -> None:
        """Goes on right after the firing that ``state`` belongs to."""
        self.epoch, self.iteration, self.step = state.epoch, state.iteration, state.step
        self.history, self.times = state._history, state._times
        self.counts = {**state.event_counts, **{event: (0, 0) for event in PER_RUN}}
        self.handler_state = ReadOnlyDict(state.handler_state)
        self.outputs, self.event = state.outputs, state.event
        self.metrics = state._metrics
        self.place = state._next
        if self.place == END:
            if state.epoch >= self.max_epoch or (
                # The same script again: a run that has ended stays ended unless epochs grew.
                self.loop.start is None and self.max_epoch <= (state.max_epoch or 0)
            ):
                self.ended = state
                return
            self.place = NEXT_EPOCH
        elif state.status == "halted" and self.loop.start is not None:
            # `from_state` goes on from a halted state; its epoch is over.
            self.place = NEXT_EPOCH
            self.epoch, self.iteration = state.epoch + 1, 0
        else:
            if state.status == "halted":
                self.status, self.halted_by = state.status, state.halted_by
            # A firing that was left in the middle is what comes next, and begins again.
            if state.event is not None and state._next != state.event:
                row = ROWS[state.event]
                if row.ends_epoch and self.epoch not in self.history:
                    # Kept by a handler of that firing, before the history was written.
                    self.history = self.history.added(self.epoch, state._metrics)
                self._leave(row)
        cell = state._cell
        self.carry = (
            copy(as_state(cell.step_state, "from_state: state.step_state")),
            copy(cell.accumulators),
        )
        self.clock = EpochClock(state._elapsed_s)
        if self.place in IN_EPOCH or self.epoch < self.max_epoch:
            consumed = 0
            if self.place in IN_EPOCH:
                consumed = self.iteration + (self.place == Event.ITERATION_COMPLETED)
            began = now()
            self.max_iteration = self.feed.open(self.epoch, consumed, state._position or NOWHERE)
            if self.feed.num_skipped:
                logger.info(
                    "read past %d batches of epoch %d in %.3f s, to go on where the run was",
                    self.feed.num_skipped,
                    self.epoch,
                    now() - began,
                )
            self.sample = self.feed.sample()

    def _compile_for(self, sample: Batch, state: PyTree) -> None:
        self.program = self.loop._programs.specialize(
            self.loop.step_fn, self.loop.metrics, sample, state, fuse=self.fuse, jit=self.jit
        )
        self.feed.configure(self.program.rows, placement(state), self.loop._programs.numbers)

    def _specialize(self) -> None:
        """Finds the program for the sample; shapes of step, loss and metrics are checked here."""
        if self.sample is None or self.ended is not None:
            return
        self._doing = ("while checking the step and its metrics on the first batch",)
        self._compile_for(self.sample, self.carry[0])
        if self.place not in IN_EPOCH:
            if self.place not in ROWS or not ROWS[self.place].ends_epoch:
                self._fresh_metrics()
        else:
            # Their structure is the metrics'; a checkpoint keeps their leaves alone.
            assert self.program is not None
            fresh = jax.eval_shape(self.program.init_metrics)
            leaves = jax.tree.leaves(self.carry[1])
            same = state_signature(jax.tree.leaves(fresh)) == state_signature(leaves)
            if same:
                self.carry = (self.carry[0], jax.tree.unflatten(jax.tree.structure(fresh), leaves))
                self._find_extra()
            else:
                raise ArgumentError(
                    "the state to go on from is in mid-epoch, and has accumulators of other "
                    "metrics than this loop",
                    fix="attach the same metrics, or go on from the end of an epoch",
                )

    def _fresh_metrics(self) -> None:
        program = self.program
        if program is None:
            return
        self.carry = (self.carry[0], program.init_metrics())
        self.metrics, self.extra = Lazy(program.fresh_values), {}

    def report(self) -> Report:
        """What `Loop.check` returns."""
        program = self.program
        leaves = jax.tree.leaves(self.carry[0])
        flops = temp_bytes = None
        capacity = length = 1
        if program is not None and self.sample is not None:
            capacity = program.capacity
            counts = {**self.counts, Event.ITERATION_STARTED: (1, 1)}
            length = plan.block_length(self.watches, counts, self._room(capacity))
            compiled = program.lower(self.carry, self.sample.value).compile()
            costs = compiled.cost_analysis() or {}
            flops = costs.get("flops")
            memory = compiled.memory_analysis()
            temp_bytes = None if memory is None else memory.temp_size_in_bytes
        schedule = tuple(
            (a.kind, a.name, ", ".join(a.events), repr(a.filter)) for a in self.loop.attachments
        )
        return Report(
            schedule,
            length,
            capacity,
            len(leaves),
            sum(x.size for x in leaves),
            sum(x.nbytes for x in leaves),
            flops,
            temp_bytes,
        )

    # --- the walk ------------------------------------------------------------------------------

    def states(self) -> Iterator[State]:
        """Runs to the end; yields a `State` after each epoch."""
        return self._states(give=True)

    def finish(self) -> None:
        """Runs to the end."""
        for _ in self._states(give=False):
            pass

    def _states(self, give: bool) -> Iterator[State]:
        if self.ended is not None or self.max_epoch == 0:
            return
        with self.signals, self.feed:
            try:
                for one in self.handlers:
                    if one.open is not None:
                        self._saves.append((one, one.open()))
                yield from self._walk(give)
                self._flush()
                self._land(0)
            except GeneratorExit:
                self._close(None)
                raise
            except BaseException as error:
                self._explain(error)
                self._close(error)
                raise
            self._close(None)

    def _walk(self, give: bool) -> Iterator[State]:
        try:
            yield from self._rows(give)
        except Interrupted:
            name = self.signals.name
            if name is None:
                raise  # another run's
            if not self.signals.nested:
                logger.warning(
                    "%s: the run ends here with the status 'interrupted', in epoch %d after step "
                    "%d; a second Ctrl-C stops at once",
                    name,
                    self.epoch,
                    self.step,
                )
            self.status, self.halted_by = "interrupted", name
            self._fire(ROWS[Event.HALTED], then=self.place)

    def _rows(self, give: bool) -> Iterator[State]:
        self._fire(ROWS[Event.STARTED], then=self.place)
        while self.place != END:
            place = self.place
            if place == NEXT_EPOCH:
                more = self.epoch < self.max_epoch
                if more:
                    self.signals.poll()
                self.place = Event.EPOCH_STARTED if more else Event.COMPLETED
            elif place == FETCH:
                self.signals.poll()
                for _, saves in self._saves:
                    saves.poll()
                self.place = Event.ITERATION_STARTED if self._more() else Event.EPOCH_COMPLETED
            elif place == STEP:
                self._run_block()
            else:
                row = ROWS[place]
                if row.event is Event.EPOCH_STARTED:
                    self._open_epoch()
                self._fire(row)
                if row.ends_epoch:
                    if give:
                        self._flush()
                        with self.signals.paused():  # the caller's code runs
                            yield self._view(row.event)
                        self._release()
                    self._leave(row)
                    self.feed.close_epoch()

    def _close(self, error: BaseException | None) -> None:
        """Waits until everything is on disk; what fails there does not hide ``error``."""
        failed: CheckpointError | None = None
        for _, saves in self._saves:
            try:
                saves.close()
            except CheckpointError as problem:
                leaving = error or failed
                if leaving is None:
                    failed = problem
                else:
                    leaving.add_note(f"jaxloop: besides, {problem}")
        self._saves = []
        if failed is not None:
            raise failed

    def _open_epoch(self) -> None:
        self._doing = ("while opening the data of epoch {}", self.epoch)
        self.clock = EpochClock(before=self.clock)
        self.counts = {event: (total, 0) for event, (total, _) in self.counts.items()}
        self._free = 0
        self.max_iteration = self.feed.open(self.epoch, 0)
        if self.program is None:
            # Attached where the data of an epoch end: this is the first batch that is seen.
            self.sample = self.feed.sample()
            if self.sample is not None:
                self._compile_for(self.sample, self.carry[0])
        self._fresh_metrics()

    def _more(self) -> bool:
        """Whether this epoch has another iteration."""
        if self.iterations is not None and self.iteration >= self.iterations:
            return False
        self._doing = (
            "while reading the data of epoch {} before iteration {}",
            self.epoch,
            self.iteration,
        )
        began = now()
        more = self.feed.more()
        self.clock.data_s += now() - began
        if not more and self.iteration == 0 and not self.feed.one_shot:
            raise DataError(
                f"run: the data of epoch {self.epoch} are empty: they gave no batch",
                fix="pass a re-iterable (a list, jl.batches), not one that is used up",
            )
        if not more and self.feed.one_shot and self.iterations is not None:
            raise DataError(
                f"run: the one-shot iterator ran dry: it gave {self.feed.num_read} batches, in "
                f"epoch {self.epoch} only {self.iteration} of the {self.iterations} that "
                "iterations= asks for",
                fix="pass fewer epochs or iterations, or a re-iterable",
            )
        return more

    def _count(self, event: Event, by: int = 1) -> None:
        total, epoch = self.counts[event]
        self.counts[event] = (total + by, epoch + by)

    def _leave(self, row: EventRow) -> None:
        if row.leave is None:
            return
        self.event = None
        if row.leave == "iteration":
            self.iteration += 1
        elif row.leave == "epoch":
            self.epoch, self.iteration = self.epoch + 1, 0

    # --- one firing ----------------------------------------------------------------------------

    def _fire(self, row: EventRow, *, then: str | None = None) -> None:
        """The steps of a firing, in the order that `jaxloop.events` states."""
        event = self.event = row.event
        self.place = row.next if then is None else then
        if event is Event.EPOCH_HALTED and self.status == "halted":
            self.place = row.next_if_halted
        if event is Event.COMPLETED:
            self.status = "completed"
        if row.ends_epoch:
            self._end_clock()
        self._count(event)
        if event in self._unwatched:
            self._leave(row)
            return
        self.log("%s: epoch %d, iteration %d", event.value, self.epoch, self.iteration)
        due = []
        if not (self._free and event in ITERATION_EVENTS):
            due = [one for one in self.handlers if event in one.events and self._perhaps(one)]
        if due:
            try:
                self._flush()
                began = now()
                self._run_handlers(row, due)
            except BaseException:
                # As if it had not begun: whoever goes on from here begins it again.
                total, epoch = self.counts[event]
                self.counts[event] = (total - 1, epoch - 1)
                self.place = event if then is None else then
                self._wanted = []
                raise
            self._release()
            self.clock.handlers_s += now() - began
        if row.ends_epoch:
            self._keep_metrics()
        self._save(event)
        self._notice(event)
        if not row.ends_epoch:
            self._leave(row)

    def _end_clock(self) -> None:
        """Ends the epoch's clock where the device ends its last block."""
        clock = self.clock
        self.times = self.times.added(self.epoch, clock)
        if self._flight:
            clock.end(self._flight[-1].marker)
            self._flight[-1].clock = clock
        else:
            clock.end(None)
        self.clock = EpochClock(before=clock)

    def _keep_metrics(self) -> None:
        """Writes the epoch's history, without waiting for it."""
        if isinstance(self.metrics, Row):
            self.metrics.keep()
        self.history = self.history.added(self.epoch, self.metrics)
        self._unsettled.append(self.metrics)
        if len(self._unsettled) > EPOCHS_UNSETTLED:
            self._unsettled.popleft().get()

    def _perhaps(self, one: Attachment) -> bool:
        return filters.asks(one.filter) or one.filter.matches(self._firing(one))

    def _firing(self, one: Attachment, view: Callable[[], Any] = lambda: None) -> Firing:
        assert self.event is not None
        total, epoch = self.counts[self.event]
        elapsed_s = now() - self._ran.get(id(one), self._began) if self.timed else 0.0
        return Firing(total, epoch, elapsed_s, view)

    def _run_handlers(self, row: EventRow, due: list[Attachment]) -> None:
        state = self._view(row.event)
        before = (state, self.extra)
        try:
            for one in due:
                status, state = self._run_handler(row, one, state)
                if status is not Status.CONTINUE:
                    self._halt(row, status, one)
                    return
        except BaseException:
            self._take_back(*before)
            raise

    def _run_handler(self, row: EventRow, one: Attachment, state: State) -> tuple[Status, State]:
        self._doing = self._place_of("handler", one.name, row.event)
        if not one.filter.matches(self._firing(one, Known(state).get)):
            return Status.CONTINUE, state
        if self.timed:
            self._ran[id(one)] = now()
        began = now()
        result = one.fn(state)
        self.log("handler %s took %.6f s", one.name, now() - began)
        if one.kind == "saver":
            wanted, result = result
            if wanted:
                self._wanted.append(one)
        elif one.kind == "guard":
            return (Status.CONTINUE, state) if result is None else self._rescue(row, one, result)
        if result is None:
            return Status.CONTINUE, state
        status, changed = self._checked(one, row.event, result)
        self._adopt(state, changed, one)
        return status, self._view(row.event) if changed is not state else state

    def _take_back(self, state: State, extra: Mapping[str, Any]) -> None:
        """Makes undone what the handlers of a firing did."""
        self.handler_state, self.outputs = ReadOnlyDict(state.handler_state), state.outputs
        self.history, self.times = state._history, state._times
        self.status, self.halted_by = state.status, state.halted_by
        self.metrics, self.extra = state._metrics, extra
        if state.max_epoch is not None:
            self.max_epoch = state.max_epoch
        if self.carry[0] is not state._cell.step_state:
            self._cell = state._cell
            self.carry = (state._cell.step_state, state._cell.accumulators)

    def _rescue(self, row: EventRow, one: Attachment, problem: str) -> tuple[Status, State]:
        """Does what a guard asks for when the state is not good."""
        found = None
        if one.rewinds:
            like = self.carry[0]
            saved = [state for _, saves in self._saves if (state := saves.newest(like)) is not None]
            found = max(saved, key=lambda state: state.step, default=None)
        logger.warning(
            "`%s`, epoch %d, step %d: %s; %s",
            one.name,
            self.epoch,
            self.step,
            problem,
            "the loop halts" if found is None else f"back to the checkpoint of step {found.step}",
        )
        if found is None:
            return Status.HALT_LOOP, self._view(row.event)
        # The counters and the data go on: what lies between is stepped over.
        self.handler_state = ReadOnlyDict(found.handler_state)
        self.carry = (found._cell.step_state, self.carry[1])
        if found.epoch == self.epoch and found._next in IN_EPOCH:
            leaves = jax.tree.leaves(found._cell.accumulators)
            accumulators = jax.tree.unflatten(jax.tree.structure(self.carry[1]), leaves)
            self.carry = (self.carry[0], accumulators)
            self.metrics = found._metrics
            self._find_extra()
        else:
            self._fresh_metrics()
        self.carry = copy(self.carry)
        self._cell = None
        return Status.CONTINUE, self._view(row.event)

    def _checked(self, one: Attachment, event: Event, result: Any) -> tuple[Status, State]:
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], State):
            with contextlib.suppress(ValueError):
                return Status(result[0]), result[1]
        raise HandlerReturnError(
            f"handler `{one.name}` on {event.value} returned {_in_words(result)}; it must return "
            "None or (status, state).",
            fix="return None to continue, or (jl.Status.HALT_LOOP, state) to stop.",
        )

    def _halt(self, row: EventRow, status: Status, one: Attachment) -> None:
        if status is Status.HALT_EPOCH:
            if not row.in_epoch:
                raise HaltError(
                    f"handler `{one.name}` on {row.event.value} returned halt_epoch, and no epoch "
                    "is running there",
                    fix="return (jl.Status.HALT_LOOP, state), or attach it to an iteration's event",
                )
            self.place = Event.EPOCH_HALTED
        elif row.event not in (Event.HALTED, Event.COMPLETED):
            self.status, self.halted_by = "halted", one.name
            self.place = row.next_if_halted

    def _adopt(self, old: State, new: State, one: Attachment) -> None:
        """Takes over what a handler changed."""
        if new is old:
            return
        for name in ("epoch", "iteration", "step", "event_counts"):
            if getattr(new, name) != getattr(old, name):
                raise StructureError(
                    f"handler `{one.name}` changed state.{name} from {getattr(old, name)!r} to "
                    f"{getattr(new, name)!r}, and the counters are the driver's",
                    fix="change step_state, metrics, handler_state, history, times or max_epoch",
                )
        self.handler_state = ReadOnlyDict(new.handler_state)
        self.history, self.times = new._history, new._times
        self.outputs = new.outputs
        if new.max_epoch is not None:
            self.max_epoch = new.max_epoch
        if new._metrics is not old._metrics:
            self.metrics = new._metrics
            self._find_extra()
        if new._cell is not old._cell:
            self._change_step_state(new._cell.step_state, one)

    def _find_extra(self) -> None:
        """Finds the metrics that are not accumulated: handlers added them to the epoch's."""
        known = () if self.program is None else self.program.metrics.names
        self.extra = {n: v for n, v in self.metrics.get().items() if n not in known}

    def _change_step_state(self, changed: PyTree, one: Attachment) -> None:
        old = self.carry[0]
        if structure(changed) == structure(old):
            changed = jax.tree.map(
                lambda new, was: (
                    jax.numpy.asarray(new, was.dtype)
                    if isinstance(new, bool | int | float | complex)
                    else new
                ),
                changed,
                old,
            )
        changed = as_state(changed, f"handler `{one.name}`: state.step_state")
        if state_signature(changed) != state_signature(old):
            what = (
                f"handler `{one.name}` changed the structure, a shape or a dtype of the step "
                f"state, so that the step compiles again: {_difference(old, changed)}"
            )
            fix = "keep the structure; Python numbers are cast to the old leaf's dtype"
            if self.strict:
                raise RecompilationError(what, fix=fix)
            self._warn_once("structure", f"{what}\n  fix: {fix}")
            if self.sample is not None:
                self._compile_for(self.sample, changed)
        # The handler's arrays stay the handler's: the carry gets buffers of its own, and so do the
        # accumulators, which the state before the change still points at.
        self.carry = copy((changed, self.carry[1]))
        self._cell = None

    def _save(self, event: Event) -> None:
        ending = event in (Event.COMPLETED, Event.HALTED)
        wanted, self._wanted = self._wanted, []
        if not wanted and not (ending and self._saves):
            return
        self._doing = ("while saving at {}", event.value)
        began = now()
        self._save_to([saves for one, saves in self._saves if ending or one in wanted], event)
        self._release()
        for _, saves in self._saves:
            saves.begin()
        self.clock.handlers_s += now() - began

    def _save_to(self, stores: list[Saves], event: Event | None) -> None:
        state = self._view(event)
        for one in self.handlers:
            problem = one.fn(state) if stores and one.kind == "guard" else None
            if problem is not None:
                logger.warning("step %d is not saved: `%s`: %s", self.step, one.name, problem)
                return
        for saves in stores:
            saves.save(state)

    # --- observers -----------------------------------------------------------------------------

    def _notice(self, event: Event) -> None:
        """Remembers the firing for its observers: they run while the device works."""
        snapshot: Snapshot | None = None
        for one in self.observers.all:
            if event not in one.events:
                continue
            firing = self._firing(one)
            asks = filters.asks(one.filter)
            if not asks and not one.filter.matches(firing):
                continue
            if self.timed:
                self._ran[id(one)] = now()
            if snapshot is None:
                if isinstance(self.metrics, Row):
                    self.metrics.start()
                snapshot = Snapshot.of(self._fields())
            self.observers.notice(one, firing if asks else None, snapshot)

    def _fields(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "max_epoch": self.max_epoch,
            "iteration": self.iteration,
            "max_iteration": self.max_iteration,
            "step": self.step,
            "status": self.status,
            "halted_by": self.halted_by,
            "event": self.event,
            "_metrics": self.metrics,
            "_history": self.history,
            "_times": self.times,
            "_counts": (dict(self.counts), 0, 0),
        }

    def _flush(self) -> None:
        self._look(self.observers.take())

    def _look(self, noticed: list[Noticed]) -> None:
        """Runs observers."""
        if not noticed:
            return
        began = now()
        for one, snapshot in due(noticed):
            self._doing = self._place_of("observer", one.name, snapshot.event, snapshot)
            one.fn(snapshot)
        self.clock.handlers_s += now() - began

    # --- one block -----------------------------------------------------------------------------

    def _room(self, most: int) -> int:
        room = most
        if self.iterations is not None:
            room = min(room, self.iterations - self.iteration)
        if self.observers.look_inside:
            room = min(room, WATCHED_ITERATIONS)
        return max(1, room)

    def _run_block(self) -> None:
        """Runs iterations up to the next one at which a handler may run; its start has fired."""
        program, clock = self.program, self.clock
        assert program is not None
        self._doing = (
            "while reading the data of epoch {} from iteration {} on",
            self.epoch,
            self.iteration,
        )
        began = now()
        room = self._room(program.room)
        if not self._free:
            self._free = plan.block_length(self.watches, self.counts, max(room, HORIZON))
        limit = min(self._free, room)
        if self.feed.prepared:
            window = self.feed.take(limit)
        else:
            most = self._stack_length(limit, 0)
            window = self.feed.read(limit, most, lambda: now() - began > PATIENCE_S)
        read = now()
        self._look_at_shape(window.signature)
        count = window.length
        self._doing = (
            "in the step, epoch {}, iterations {} to {}",
            self.epoch,
            self.iteration,
            self.iteration + count - 1,
        )
        out: Output = program.run(self.carry, window.source, window.start, window.bound)
        dispatched = now()
        self.carry, self.outputs = out.carry, out.outputs
        window.reading(out.marker)
        noticed = self.observers.take()
        rows = Rows(program, out.ring, self.feed.number)
        ahead = self._stack_length(count, count + self.feed.prepared) if self.feed.idle else 0
        # Where a clock is asked, a handler may run after any block.
        self._free = 0 if self.timed else self._free - count
        if count > 1:
            if self.observers.look_inside:
                self.observers.notice_block(self._fields(), count, rows, self.extra)
            self._count(Event.ITERATION_STARTED, count - 1)
            self._count(Event.ITERATION_COMPLETED, count - 1)
        self.step += count
        self.iteration += count - 1
        self.metrics = Row(rows, count - 1, self.extra)
        self.place = Event.ITERATION_COMPLETED
        # From here on the state is whole again: what goes wrong now finds it so.
        self._flight.append(_Flying(out.marker, count, dispatched))
        self.feed.ahead(ahead)
        clock.data_s += read - began
        clock.dispatch_s += dispatched - read
        self._look(noticed)
        self._doing = ("in the step, near epoch {}, iteration {}", self.epoch, self.iteration)
        self._land(BLOCKS_IN_FLIGHT)
        unknown = program.span is None
        if unknown or (self.feed.data is None and program.room < program.capacity):
            self._land(0)  # how long a step takes decides the blocks that follow

    def _stack_length(self, count: int, offset: int) -> int:
        """How many batches to stack, ``offset`` iterations from now; a block has ``count``."""
        assert self.program is not None
        most = min(self.program.rows, self.program.span or 1)
        if offset + most <= self._free:
            return most
        if not self.feed.one_shot:
            return plan.stack_length(self.watches, self.counts, offset, most)
        # It is read no further than the next iteration at which a handler may run.
        if not offset:
            return count
        return plan.block_length(self.watches, self.counts, offset + most) - offset

    def _land(self, in_flight: int) -> None:
        """Waits until no more than so many blocks are in flight."""
        while len(self._flight) > in_flight:
            block = self._flight.popleft()
            block.marker.block_until_ready()
            landed = now()
            if block.clock is not None:
                block.clock.settle()
            block_s = landed - max(block.dispatched, self._landed)
            self._landed = landed
            self._fit_span(block.count, block_s)

    def _fit_span(self, count: int, block_s: float) -> None:
        """Says how many iterations the next blocks may have, after one of ``count``."""
        assert self.program is not None
        span = self.program.span or 1
        if block_s > LONG_BLOCK_S:
            span = max(1, int(count * LONG_BLOCK_S / block_s))
        elif block_s < SHORT_BLOCK_S and count >= span:
            span = int(count * min(SPAN_FACTOR, SHORT_BLOCK_S / block_s))
        self.program.span = span

    def _look_at_shape(self, signature: Signature) -> None:
        """Reports a batch of a shape that has to be compiled for."""
        sample = self.sample
        if sample is None or signature is sample.signature or signature == sample.signature:
            return
        self._signatures |= {sample.signature, signature}
        what = signature_change(sample.signature, signature)
        fix = "serve batches of one shape: jl.batches(..., pad=True) or drop_remainder=True"
        if self.strict:
            raise RecompilationError(
                f"strict: epoch {self.epoch}, iteration {self.iteration} would compile the step "
                f"again: {what}",
                fix=fix,
            )
        if len(self._signatures) >= SIGNATURES_BEFORE_WARNING:
            self._warn_once(
                "shapes", f"the shapes of the batches keep changing: {what}\n  fix: {fix}"
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=2)

    # --- states --------------------------------------------------------------------------------

    def _view(self, event: Event | None) -> State:
        """The run as a `State`; what it points at is copied before it is donated."""
        if self._cell is None:
            self._cell = Cell(*self.carry)
        return State(
            epoch=self.epoch,
            max_epoch=self.max_epoch,
            iteration=self.iteration,
            max_iteration=self.max_iteration,
            step=self.step,
            _history=self.history,
            _times=self.times,
            outputs=self.outputs,
            event_counts=ReadOnlyDict(self.counts),
            handler_state=self.handler_state,
            status=self.status,
            halted_by=self.halted_by,
            event=event,
            _metrics=self.metrics,
            _cell=self._cell,
            _next=self.place,
            _position=self.feed.position,
            _elapsed_s=self.clock.elapsed_s,
        )

    def _release(self) -> None:
        """Takes the carry back: it may be donated unless somebody has, or can get, its arrays."""
        if self._cell is None:
            return
        # Two references: the attribute's and the argument's.
        kept = self._cell.read or sys.getrefcount(self._cell) > 2
        self._cell = None
        if kept and self.options is not None:
            self.carry = copy(self.carry)

    def output(self, transform: Callable[[State], Any] | None) -> Any:
        """What `Loop.run` returns."""
        state = self.ended if self.ended is not None else self._view(self.event)
        best = state.handler_state.get(self.loop.best_of) if self.loop.best_of else None
        if best is not None and best["step_state"] is not None:
            state = state.replace(step_state=best["step_state"])
        transform = transform or self.loop.output_transform
        return state if transform is None else transform(state)

    # --- errors --------------------------------------------------------------------------------

    def _place_of(
        self, kind: str, name: str, event: Event | None, at: Snapshot | None = None
    ) -> tuple[Any, ...]:
        seen = at or self
        template = "in {} `{}` on {}, epoch {}, iteration {}"
        return (template, kind, name, event, seen.epoch, seen.iteration)

    def _explain(self, error: BaseException) -> None:
        """Adds to an exception where it happened and, as ``loop_state``, the last good `State`.

        Before it leaves, observers get their last values, and what is to be saved is saved.
        """
        template, *arguments = self._doing
        error.add_note(f"jaxloop: {template.format(*arguments)}")
        state = self._view(self.event) if self._alive() else None
        with contextlib.suppress(AttributeError):
            error.loop_state = state  # type: ignore[attr-defined]  # made here
        if not isinstance(error, Exception):
            return  # a second Ctrl-C: at once
        wanted = [saves for _, saves in self._saves if saves.on_exception]
        last: list[Callable[[], None]] = [self._flush]
        if wanted and state is not None and not isinstance(error, CheckpointError):
            last.append(lambda: self._save_to(wanted, self.event))
        for act in last:
            try:
                act()
            except Exception as besides:  # it must not hide the error that leaves
                error.add_note(f"jaxloop: besides, {type(besides).__name__}: {besides}")

    def _alive(self) -> bool:
        """Whether the carried arrays are there: not donated, and no error of the device's."""
        try:
            jax.block_until_ready(self.carry)
        except Exception:  # whatever it is, it is what is being explained
            return False
        return True


@dataclasses.dataclass
class _Flying:
    """A block that the device may not have done yet.

    Attributes:
        clock: Of the epoch that ends with it.
    """

    marker: Any
    count: int
    dispatched: float
    clock: EpochClock | None = None


def _silent(*args: object) -> None:
    return None


def _in_words(value: Any) -> str:
    article = "an" if type(value).__name__[0].lower() in "aeiou" else "a"
    return f"{article} {type(value).__name__} ({value!r:.80})"


def _difference(old: PyTree, new: PyTree) -> str:
    def leaves(tree: PyTree) -> dict[str, str]:
        return {
            jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    was, now = leaves(old), leaves(new)
    parts = [
        f"step_state{name} from {was.get(name, 'nothing')} to {now.get(name, 'nothing')}"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    ]
    return "; ".join(parts) or f"{jax.tree.structure(old)} to {jax.tree.structure(new)}"
