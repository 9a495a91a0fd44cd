"""The driver: the only mutable loop, and the only clock.

    run = Run(loop, data, init_state, epochs=3, ...)
    for state in run.states():      # one an epoch
        ...
    run.output(None)

It walks the rows of `jaxloop.events`. Between two handlers it runs one compiled block. Whoever
watches, the blocks are the same program: only their lengths differ.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxloop import filters, plan
from jaxloop.compile import (
    Output,
    Program,
    as_state,
    check_fuse,
    copy,
    jit_options,
    state_signature,
)
from jaxloop.data import Batch, Feed, Signature, signature_change
from jaxloop.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    HaltError,
    HandlerReturnError,
    RecompilationError,
    StructureError,
    missing_metric,
)
from jaxloop.events import END, FETCH, NEXT_EPOCH, PER_RUN, ROWS, STEP, Event, Row, Status
from jaxloop.filters import Firing
from jaxloop.loop import Attachment, Loop, collection
from jaxloop.state import (
    Cell,
    Lazy,
    PyTree,
    ReadOnlyDict,
    Snapshot,
    State,
    split_emission,
    structure,
)

logger = logging.getLogger("jaxloop")

BLOCKS_IN_FLIGHT = 2
SIGNATURES_BEFORE_WARNING = 3
BOUNDARY_S = 1.0
"""How often a block must end when a filter asks a clock."""


class _Rows:
    """The metrics after each iteration of a block: nothing is computed until somebody asks."""

    def __init__(self, program: Program, ring: Callable[[], PyTree]) -> None:
        self._program = program
        self._ring: Callable[[], PyTree] | None = ring
        self._row: Callable[[int], dict[str, Any]] = lambda index: {}

    def start(self) -> None:
        """Dispatches the computation, without waiting; needed before a donation."""
        if self._ring is not None:
            self._row = self._program.values(self._ring())
            self._ring = None

    def get(self, index: int, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of one row, together with what handlers added."""
        self.start()
        row = self._row(index)
        return {**row, **{name: v for name, v in extra.items() if name not in row}}


@dataclasses.dataclass(frozen=True)
class Report:
    """What `Loop.check` found; prints as a table.

    Attributes:
        schedule: What fires when: (kind, name, events, filter).
        block_length: Iterations that the first block holds.
        capacity: Iterations that a block may hold; 1: the step is never fused.
        num_leaves: Leaves of the step state.
        num_elements: Numbers in the step state; with a trainer's also of its parameters.
        size_bytes: Bytes of the step state.
        flops: Floating-point operations of a compiled block's body, where XLA tells.
        temp_bytes: Memory that the compiled block needs for itself, in bytes, where XLA tells.
    """

    schedule: tuple[tuple[str, str, str, str], ...]
    block_length: int
    capacity: int
    num_leaves: int
    num_elements: int
    size_bytes: int
    flops: float | None
    temp_bytes: int | None

    def __str__(self) -> str:
        rows = [("kind", "name", "events", "filter"), *self.schedule]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        facts = {
            "first block": f"{self.block_length} iterations of at most {self.capacity}",
            "step state": f"{self.num_leaves} leaves, {self.num_elements} numbers, "
            f"{self.size_bytes} bytes",
            "compiled": f"{self.flops if self.flops is not None else 'unknown'} FLOPs, "
            f"{self.temp_bytes if self.temp_bytes is not None else 'unknown'} bytes of its own",
        }
        return "\n".join([*lines, *(f"{name}: {fact}" for name, fact in facts.items())])


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
        _check_count("epochs", epochs, at_least=0)
        if iterations is not None:
            _check_count("iterations", iterations, at_least=1)
        check_fuse(fuse)
        self.options = jit_options(jit)
        self.loop, self.iterations, self.strict = loop, iterations, strict
        self.jit, self.fuse = jit, fuse
        self.log = logger.info if debug else _silent
        self.feed = Feed(data, epochs=epochs, iterations=iterations)
        self.handlers = [a for a in loop.attachments if a.kind != "observer"]
        self.observers = [a for a in loop.attachments if a.kind == "observer"]
        self.watches = [plan.Watch(e, a.filter) for a in self.handlers for e in a.events]
        self.timed = any(filters.timed(a.filter) for a in loop.attachments)
        self.inner_observers = [
            a
            for a in self.observers
            if Event.ITERATION_STARTED in a.events or Event.ITERATION_COMPLETED in a.events
        ]

        self.max_epoch = epochs
        self.max_iteration: int | None = iterations
        self.epoch = self.iteration = self.step = 0
        self.history: ReadOnlyDict = ReadOnlyDict()
        self.times: ReadOnlyDict = ReadOnlyDict()
        self.counts: dict[Event, tuple[int, int]] = {event: (0, 0) for event in Event}
        self.handler_state: ReadOnlyDict = ReadOnlyDict()
        self.status: str = "running"
        self.halted_by: str | None = None
        self.event: Event | None = None
        self.outputs: PyTree = {}
        self.place = NEXT_EPOCH
        self.carry: tuple[PyTree, PyTree] = ({}, {})
        self.metrics = Lazy(dict)
        self.program: Program | None = None
        self.sample: Batch | None = None
        self.ended: State | None = None

        self._cell: Cell | None = None
        self._saves: list[Attachment] = []
        self._commits: dict[int, Callable[[State], None]] = {}
        self._queue: list[tuple[Attachment, Firing, Snapshot]] = []
        self._flight: collections.deque[Any] = collections.deque()
        self._signatures: set[Signature] = set()
        self._warned: set[str] = set()
        self._doing = "while making the first state"
        self._limit = sys.maxsize
        self._began = self._epoch_began = time.perf_counter()
        self._ran: dict[int, float] = {}
        self._prepare(init_state)

    # --- before the first event ----------------------------------------------------------------

    def _prepare(self, init_state: PyTree) -> None:
        """Makes or attaches the state, and checks what can be known now."""
        _check_metrics(self.loop)
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
        sample = self.feed.peek()
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
        if loop.supervised is not None:
            init_state = loop.supervised.prepare(init_state, sample.value)
        fn = getattr(loop.init_fn, "fn", loop.init_fn)  # prepared here, outside the trace
        init = loop._programs.init(fn, self.options is not None)
        state, outputs = split_emission(init(sample.value, init_state))
        if loop.supervised is not None:
            loop.supervised.check(outputs)
        return copy(as_state(state, "what init_fn returned"))

    def _resumed(self, init_state: PyTree) -> State | None:
        from jaxloop.checkpoint import load_latest

        assert self.loop.resume_path is not None
        sample = self._read_sample()
        like = self._init(sample, init_state)
        self.feed.close_epoch()
        state = load_latest(self.loop.resume_path, like)
        if state is None:
            self.sample, self.carry = sample, (like, {})
            self.feed.open(0, 0)
        return state

    def _attach(self, state: State) -> None:
        """Goes on right after the firing that ``state`` belongs to."""
        self.epoch, self.iteration, self.step = state.epoch, state.iteration, state.step
        self.history, self.times = ReadOnlyDict(state.history), ReadOnlyDict(state.times)
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
            if state.event is not None:
                row = ROWS[state.event]
                if row.ends_epoch and self.epoch not in self.history:
                    # Kept by a handler of that firing, before the history was written.
                    self.history = ReadOnlyDict({**self.history, self.epoch: state.metrics})
                self._leave(row)
        cell = state._cell
        self.carry = (
            copy(as_state(cell.step_state, "from_state: state.step_state")),
            copy(cell.accumulators),
        )
        self._epoch_began = time.perf_counter() - state._elapsed_s
        self.feed.restore_unread(state._unread)
        if self.place in (FETCH, STEP):
            self.max_iteration = self.feed.open(self.epoch, self.iteration)
            self.sample = self.feed.peek()
        elif self.epoch < self.max_epoch:
            self.max_iteration = self.feed.open(self.epoch, 0)
            self.sample = self.feed.peek()

    def _program(self, sample: Batch, state: PyTree) -> Program:
        return self.loop._programs.specialize(
            self.loop.step_fn, collection(self.loop), sample, state, fuse=self.fuse, jit=self.jit
        )

    def _specialize(self) -> None:
        """Finds the program for the sample; shapes of step, loss and metrics are checked here."""
        if self.sample is None or self.ended is not None:
            return
        self._doing = "while checking the step and its metrics on the first batch"
        self.program = self._program(self.sample, self.carry[0])
        if self.place not in (FETCH, STEP):
            self._fresh_metrics()
        else:
            # Their structure is the metrics'; a checkpoint keeps their leaves alone.
            fresh = jax.eval_shape(self.program.bound.init)
            leaves = jax.tree.leaves(self.carry[1])
            same = state_signature(jax.tree.leaves(fresh)) == state_signature(leaves)
            if same:
                self.carry = (self.carry[0], jax.tree.unflatten(jax.tree.structure(fresh), leaves))
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
        accs = self.carry[1]
        rows = _Rows(program, lambda: jax.tree.map(lambda a: a[None], accs))
        self.metrics = _LazyRow(rows, 0, {})

    def report(self) -> Report:
        """What `Loop.check` returns."""
        program = self.program
        leaves = jax.tree.leaves(self.carry[0])
        flops = temp_bytes = None
        capacity = length = 1
        if program is not None and self.sample is not None:
            capacity = program.capacity
            counts = {**self.counts, Event.ITERATION_STARTED: (1, 1)}
            length = plan.block_length(self.watches, counts, self._room())
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
        if self.ended is not None or self.max_epoch == 0:
            return
        with contextlib.ExitStack() as stack:
            for index, one in enumerate(self.handlers):
                if one.commit is not None:
                    self._commits[index] = stack.enter_context(one.commit())
            try:
                yield from self._walk()
                self._flush()
            except GeneratorExit:
                raise
            except BaseException as error:
                self._explain(error)
                raise

    def _walk(self) -> Iterator[State]:
        place = self.place
        self._fire(ROWS[Event.STARTED], then=place)
        while self.place != END:
            place = self.place
            if place == NEXT_EPOCH:
                more = self.epoch < self.max_epoch
                self.place = Event.EPOCH_STARTED if more else Event.COMPLETED
            elif place == FETCH:
                self.place = Event.ITERATION_STARTED if self._more() else Event.EPOCH_COMPLETED
            elif place == STEP:
                self._run_block()
                self._fire(ROWS[Event.ITERATION_COMPLETED])
            else:
                row = ROWS[place]
                if row.event is Event.EPOCH_STARTED:
                    self._open_epoch()
                self._fire(row, give=row.ends_epoch)
                if row.ends_epoch:
                    self._flush()
                    yield self._view(row.event)
                    self._release()
                    self._leave(row)
                    self.feed.close_epoch()

    def _open_epoch(self) -> None:
        self._doing = f"while opening the data of epoch {self.epoch}"
        self._epoch_began = time.perf_counter()
        self.counts = {event: (total, 0) for event, (total, _) in self.counts.items()}
        self.max_iteration = self.feed.open(self.epoch, 0)
        if self.program is None:
            # Attached where the data of an epoch end: this is the first batch that is seen.
            self.sample = self.feed.peek()
            if self.sample is not None:
                self.program = self._program(self.sample, self.carry[0])
        self._fresh_metrics()

    def _more(self) -> bool:
        """Whether this epoch has another iteration; reads at most one batch ahead."""
        if self.iterations is not None and self.iteration >= self.iterations:
            return False
        self._doing = (
            f"while reading batch {self.feed.read} of the data, in epoch {self.epoch} before "
            f"iteration {self.iteration}"
        )
        batch = self.feed.peek()
        if batch is None and self.iteration == 0 and not self.feed.one_shot:
            raise DataError(
                f"run: the data of epoch {self.epoch} are empty: they gave no batch",
                fix="pass a re-iterable (a list, jl.batches), not one that is used up",
            )
        if batch is None and self.feed.one_shot and self.iterations is not None:
            raise DataError(
                f"run: the one-shot iterator ran dry: it gave {self.feed.read} batches, in epoch "
                f"{self.epoch} only {self.iteration} of the {self.iterations} that iterations= "
                "asks for",
                fix="pass fewer epochs or iterations, or a re-iterable",
            )
        return batch is not None

    def _count(self, event: Event, by: int = 1) -> None:
        total, epoch = self.counts[event]
        self.counts[event] = (total + by, epoch + by)

    def _leave(self, row: Row) -> None:
        if row.leave == "iteration":
            self.iteration += 1
        elif row.leave == "epoch":
            self.epoch, self.iteration = self.epoch + 1, 0

    # --- one firing ----------------------------------------------------------------------------

    def _fire(self, row: Row, *, then: str | None = None, give: bool = False) -> None:
        """The steps of a firing, in the order that `jaxloop.events` states."""
        event = self.event = row.event
        self.place = row.next if then is None else then
        if event is Event.EPOCH_HALTED and self.status == "halted":
            self.place = row.next_if_halted
        if event is Event.COMPLETED:
            self.status = "completed"
        if row.ends_epoch:
            elapsed_s = time.perf_counter() - self._epoch_began
            self.times = ReadOnlyDict({**self.times, self.epoch: elapsed_s})
        self._count(event)
        self.log("%s: epoch %d, iteration %d", event.value, self.epoch, self.iteration)
        due = [one for one in self.handlers if event in one.events and self._perhaps(one)]
        if due:
            self._flush()
            self._run_handlers(row, due)
            self._release()
        if row.ends_epoch:
            self.history = ReadOnlyDict({**self.history, self.epoch: dict(self.metrics.get())})
        self._save(event)
        for one in self.observers:
            if event in one.events:
                self._notice(one, event)
        if not give:
            self._leave(row)

    def _perhaps(self, one: Attachment) -> bool:
        return filters.asks(one.filter) or one.filter.matches(self._firing(one))

    def _firing(self, one: Attachment, view: Callable[[], Any] = lambda: None) -> Firing:
        assert self.event is not None
        total, epoch = self.counts[self.event]
        elapsed_s = time.perf_counter() - self._ran.get(id(one), self._began) if self.timed else 0.0
        return Firing(total, epoch, elapsed_s, view)

    def _run_handlers(self, row: Row, due: list[Attachment]) -> None:
        state = self._view(row.event)
        for one in due:
            self._doing = self._place_of("handler", one.name, row.event)
            if not one.filter.matches(self._firing(one, _returning(state))):
                continue
            if self.timed:
                self._ran[id(one)] = time.perf_counter()
            began = time.perf_counter()
            result = one.fn(state)
            self.log("handler %s took %.6f s", one.name, time.perf_counter() - began)
            if one.kind == "saver":
                wanted, result = result
                if wanted:
                    self._saves.append(one)
                del wanted
            if result is None:
                continue
            status, changed = self._checked(one, row.event, result)
            del result
            self._adopt(state, changed, one)
            state = self._view(row.event) if changed is not state else state
            del changed
            if status is not Status.CONTINUE:
                self._halt(row, status, one)
                return

    def _checked(self, one: Attachment, event: Event, result: Any) -> tuple[Status, State]:
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], State):
            with contextlib.suppress(ValueError):
                return Status(result[0]), result[1]
        raise HandlerReturnError(
            f"handler `{one.name}` on {event.value} returned {_in_words(result)}; it must return "
            "None or (status, state).",
            fix="return None to continue, or (jl.Status.HALT_LOOP, state) to stop.",
        )

    def _halt(self, row: Row, status: Status, one: Attachment) -> None:
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
        self.history, self.times = ReadOnlyDict(new.history), ReadOnlyDict(new.times)
        self.outputs = new.outputs
        if new.max_epoch is not None:
            self.max_epoch = new.max_epoch
        self.metrics = new._metrics
        if new._cell is not old._cell:
            self._change_step_state(new._cell.step_state, one)

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
                self.program = self._program(self.sample, changed)
        # The handler's arrays stay the handler's: the carry gets buffers of its own, and so do the
        # accumulators, which the state before the change still points at.
        self.carry = copy((changed, self.carry[1]))
        self._cell = None

    def _save(self, event: Event) -> None:
        ending = event in (Event.COMPLETED, Event.HALTED)
        if not self._saves and not (ending and self._commits):
            return
        self._doing = f"while saving at {event.value}"
        saves, self._saves = self._saves, []
        state = self._view(event)
        for index, one in enumerate(self.handlers):
            if index in self._commits and (ending or one in saves):
                self._commits[index](state)
        del state
        self._release()

    # --- observers -----------------------------------------------------------------------------

    def _notice(self, one: Attachment, event: Event) -> None:
        """Queues an observer's firing: it runs while the device works on the next block."""
        self.event = event
        firing = self._firing(one)
        if not filters.asks(one.filter) and not one.filter.matches(firing):
            return
        if self.timed:
            self._ran[id(one)] = time.perf_counter()
        if isinstance(self.metrics, _LazyRow):
            self.metrics.start()
        self._queue.append((one, firing, self._snapshot(event)))

    def _flush(self) -> None:
        queue, self._queue = self._queue, []
        for one, firing, snapshot in queue:
            assert snapshot.event is not None
            self._doing = self._place_of("observer", one.name, snapshot.event, snapshot)
            if one.filter.matches(firing._replace(view=_returning(snapshot))):
                one.fn(snapshot)

    def _snapshot(self, event: Event) -> Snapshot:
        return Snapshot(
            epoch=self.epoch,
            max_epoch=self.max_epoch,
            iteration=self.iteration,
            max_iteration=self.max_iteration,
            step=self.step,
            history=self.history,
            times=self.times,
            event_counts=ReadOnlyDict(self.counts),
            status=self.status,
            halted_by=self.halted_by,
            event=event,
            _metrics=self.metrics,
        )

    # --- one block -----------------------------------------------------------------------------

    def _room(self) -> int:
        assert self.program is not None
        room = min(self.program.capacity, self._limit)
        if self.iterations is not None:
            room = min(room, self.iterations - self.iteration)
        return max(1, room)

    def _run_block(self) -> None:
        """Runs iterations up to the next one at which a handler may run; its start has fired."""
        program = self.program
        assert program is not None
        length = plan.block_length(self.watches, self.counts, self._room())
        self._doing = (
            f"while reading the data of epoch {self.epoch} from iteration {self.iteration} on"
        )
        batches = self.feed.take(length)
        self._look_at_shapes(batches[0], program)
        count = len(batches)
        self._doing = (
            f"in the step, epoch {self.epoch}, iterations {self.iteration} to "
            f"{self.iteration + count - 1}"
        )
        began = time.perf_counter()
        out: Output = program.run(self.carry, batches)
        self.carry, self.outputs = out.carry, out.outputs
        self._flight.append(out.marker)
        while len(self._flight) > BLOCKS_IN_FLIGHT:
            self._flight.popleft().block_until_ready()
        self._flush()
        rows = _Rows(program, lambda: out.ring)
        extra = self._extra(program)
        if self.inner_observers and count > 1:
            self._notice_inside(rows, extra, count)
        else:
            self._count(Event.ITERATION_STARTED, count - 1)
            self._count(Event.ITERATION_COMPLETED, count - 1)
            self.step += count - 1
            self.iteration += count - 1
        self.step += 1
        self.metrics = _LazyRow(rows, count - 1, extra)
        if self.timed:
            jax.block_until_ready(out.marker)
            each_s = (time.perf_counter() - began) / count
            self._limit = max(1, int(BOUNDARY_S / max(each_s, 1e-9)))

    def _extra(self, program: Program) -> Mapping[str, Any]:
        """What handlers added to the metrics of this epoch: it stays until the epoch ends."""
        if isinstance(self.metrics, _LazyRow):
            return self.metrics.extra
        known = set(program.bound.names)
        return {name: v for name, v in self.metrics.get().items() if name not in known}

    def _notice_inside(self, rows: _Rows, extra: Mapping[str, Any], count: int) -> None:
        """Queues the observers of all firings inside a block but the last, in order."""
        watching = [a for a in self.inner_observers if not filters.timed(a.filter)]
        for index in range(count - 1):
            self.step += 1
            self.metrics = _LazyRow(rows, index, extra)
            self._count(Event.ITERATION_COMPLETED)
            for one in watching:
                if Event.ITERATION_COMPLETED in one.events:
                    self._notice(one, Event.ITERATION_COMPLETED)
            self.iteration += 1
            self._count(Event.ITERATION_STARTED)
            for one in watching:
                if Event.ITERATION_STARTED in one.events:
                    self._notice(one, Event.ITERATION_STARTED)

    def _look_at_shapes(self, batch: Batch, program: Program) -> None:
        """Reports a batch of a shape that has to be compiled for."""
        self._signatures.add(batch.signature)
        sample = self.sample
        if sample is None or batch.signature == sample.signature:
            return
        what = signature_change(sample.signature, batch.signature)
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
            history=self.history,
            times=self.times,
            outputs=self.outputs,
            event_counts=ReadOnlyDict(self.counts),
            handler_state=self.handler_state,
            status=self.status,
            halted_by=self.halted_by,
            event=event,
            _metrics=self.metrics,
            _cell=self._cell,
            _next=self.place,
            _unread=self.feed.unread,
            _elapsed_s=time.perf_counter() - self._epoch_began,
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

    def _place_of(self, kind: str, name: str, event: Event, at: Snapshot | None = None) -> str:
        epoch, iteration = (at or self).epoch, (at or self).iteration
        return f"in {kind} `{name}` on {event.value}, epoch {epoch}, iteration {iteration}"

    def _explain(self, error: BaseException) -> None:
        """Adds to an exception where it happened and, as ``loop_state``, the last good `State`."""
        error.add_note(f"jaxloop: {self._doing}")
        alive = not any(
            isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(self.carry)
        )
        with contextlib.suppress(AttributeError):
            error.loop_state = self._view(self.event) if alive else None  # type: ignore[attr-defined]  # made here


class _LazyRow(Lazy):
    """A row of a block's metrics, which can be computed without being fetched."""

    __slots__ = ("_rows", "extra")

    def __init__(self, rows: _Rows, index: int, extra: Mapping[str, Any]) -> None:
        super().__init__(lambda: rows.get(index, extra))
        self._rows = rows
        self.extra = extra

    def start(self) -> None:
        self._rows.start()


def _returning(value: Any) -> Callable[[], Any]:
    return lambda: value


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


def _check_count(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ArgumentTypeError(f"run: {name} must be a whole number, and is {value!r}")
    if value < at_least:
        raise ArgumentError(f"run: {name} must be at least {at_least}, and is {value}")


def _check_metrics(loop: Loop) -> None:
    """Raises if a watched metric cannot be there when it is looked at.

    Only a handler of the user's own, which may add any metric, makes that unknowable.
    """
    declared = {one.name for one in loop.metrics}
    for index, one in enumerate(loop.attachments):
        known, anything = set(declared), False
        for position, other in enumerate(loop.attachments):
            same = bool(set(other.events) & set(one.events))
            if position == index or (same and position > index):
                continue
            anything |= other.adds is None
            known |= set(other.adds or ())
        for name in one.watches:
            if name not in known and not anything:
                raise missing_metric(one.name, name, known)
