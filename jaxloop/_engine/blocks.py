"""Blocks: the compiled program, the length of its next block, and the blocks in flight.

    blocks = Blocks(spec, options, progress, carry, prefetcher, observers, clock, activity)
    blocks.specialize(sample, step_state)   # finds or makes the program
    blocks.dispatch()                       # runs iterations up to the next handler
    blocks.settle(0)                        # waits for the device

Three rules limit the length of a block: `jaxloop._core.schedule` for handlers,
`jaxloop._program.sizing` for memory, and `jaxloop._engine.in_flight` for time. No computed value
depends on where a block ends.
"""

from __future__ import annotations

import warnings
from typing import Any

from jaxloop._core.batch import Batch, Signature, signature_change
from jaxloop._core.events import IN_EPOCH, Event
from jaxloop._core.lazy import LazyDict
from jaxloop._core.placement import Placement, placement
from jaxloop._core.schedule import Watch, block_length, superbatch_length
from jaxloop._core.types import PyTree
from jaxloop._data.device_rows import Rows
from jaxloop._data.prefetch import PATIENCE_S, Prefetcher
from jaxloop._engine.activity import READING, STEPPING, WAITING, Activity
from jaxloop._engine.carry import Carry
from jaxloop._engine.clock import EpochClock, RunClock, now
from jaxloop._engine.fitting import meanings_of
from jaxloop._engine.in_flight import MOST_IN_FLIGHT, Block, InFlight
from jaxloop._engine.observers import Observers
from jaxloop._engine.options import RunOptions
from jaxloop._engine.progress import Progress
from jaxloop._engine.signatures import SAME_SHAPES, Signatures
from jaxloop._program.block import Program
from jaxloop._program.metric_rows import MetricRow, MetricRows
from jaxloop._spec import LoopSpec
from jaxloop.errors import RecompilationError, StructureError

_LOOK_AHEAD = 1024
"""How many iterations ahead the handlers' filters are evaluated."""
_OBSERVED_ITERATIONS = 4096
"""The maximum length of a block in which each iteration may be observed."""


class Blocks:
    """The program of a run, and its blocks.

    Attributes:
        program: The program, or None before the first batch.
        sample: The batch that the program was made for.
        place: The placement of the step state that the program was made for.
        quiet: The number of iterations that are known to run before a handler may.
    """

    def __init__(
        self,
        spec: LoopSpec,
        options: RunOptions,
        progress: Progress,
        carry: Carry,
        prefetcher: Prefetcher,
        observers: Observers,
        clock: RunClock,
        activity: Activity,
    ) -> None:
        self._spec, self._options = spec, options
        self._progress, self._carry, self._prefetcher = progress, carry, prefetcher
        self._observers, self._clock, self._activity = observers, clock, activity
        acting = spec.acting()
        self.watches = [Watch(event, one.filter) for one in acting for event in one.events]
        self._timed = any(one.filter.timed for one in acting)
        self.program: Program | None = None
        self.sample: Batch | None = None
        self.place = Placement()
        self.quiet = 0
        self._in_flight = InFlight()
        self._signatures = Signatures()
        self._warned = False
        self._called: tuple[Any, Any] = (None, None)

    # --- the program ---------------------------------------------------------------------------

    def specialize(self, sample: Batch, step_state: PyTree) -> Program:
        """Finds or makes the program for a batch and a step state."""
        options, programs = self._options, self._spec.programs
        self.sample, self._called = sample, (None, None)
        self.program = program = programs.specialize(
            self._spec.step_fn,
            self._spec.metrics,
            sample,
            step_state,
            fuse=options.fuse,
            options=options.jit,
        )
        self._progress.metric_meanings = meanings_of(self._spec, program)
        self._in_flight.use(program, programs.block_lengths)
        self.place = placement(step_state)
        self._prefetcher.configure(program.num_rows, self.place, programs.reusable)
        return program

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names of the metrics that are accumulated."""
        return () if self.program is None else self.program.metrics.names

    def reset_metrics(self) -> None:
        """Resets the metrics for a new epoch."""
        if self.program is not None:
            self._carry.set_accumulators(self._fresh_accumulators(self.program))
            self._progress.lazy_metrics = LazyDict(self.program.values.fresh_values)
            self._progress.added = {}

    def _fresh_accumulators(self, program: Program) -> PyTree:
        """Returns fresh accumulators. A block takes them as NumPy arrays too; see `Carry.lend`."""
        return self.place.commit(program.values.init())

    # --- one block -----------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Runs iterations up to the next handler. The start of the first one has fired."""
        program, progress, prefetcher = self.program, self._progress, self._prefetcher
        carry, observers, activity = self._carry, self._observers, self._activity
        assert program is not None
        epoch, iteration = progress.epoch, progress.iteration
        activity.now = (READING, epoch, iteration)
        began = now()
        limit = self._limit(program)
        if not prefetcher.num_ready:
            most = self._superbatch_length(program, limit, 0)
            prefetcher.read(most, lambda: now() - began > PATIENCE_S)
        if program.lengths:
            limit = program.cut(min(limit, prefetcher.num_ready or limit))
        window = prefetcher.take(limit)
        read = now()
        count, signature = window.length, window.superbatch.signature
        known = signature if self.sample is None else self.sample.signature
        if signature is not known and signature != known:
            self._report_shape(known, signature)
        last = iteration + count - 1
        activity.now = (STEPPING, epoch, iteration, last)
        carry.values, progress.outputs, ring, marker = program.run(
            carry.values, window.rows, window.start, window.bound, count
        )
        dispatched = now()
        window.superbatch.marker = marker
        queue = observers.take() if observers.queue else []
        rows = MetricRows(
            program.values, ring, carry.values[1], prefetcher.numbers, self._clock.wait
        )
        metrics = MetricRow(rows, count - 1, progress.added)
        ahead = 0
        if prefetcher.idle:
            ahead = self._superbatch_length(program, count, count + prefetcher.num_ready)
        # A handler whose filter has a clock may run after any block.
        self.quiet = 0 if self._timed or observers.timed else self.quiet - count
        if count > 1 and observers.inside:
            observers.queue_block(count, rows)
        progress.advance(count)
        progress.lazy_metrics = metrics
        # From here on, the state is consistent again, even if an error follows.
        self._in_flight.blocks.append(Block(marker, count, dispatched))
        if ahead > 0:
            prefetcher.ahead(ahead)
        self._clock.epoch.data_s += read - began
        kind = (window.rows.__class__, count if program.lengths else 0)
        # Most blocks are called like the one before, and that is cheap to see.
        if signature is self._called[0] and kind == self._called[1]:
            self._clock.epoch.dispatch_s += dispatched - read
        else:
            self._count_call(program, window.rows, signature, count, dispatched - read)
            self._called = (signature, kind)
        if queue:
            observers.show(queue)
        activity.now = (WAITING, epoch, last)
        # While the time of a step is unknown, waits to measure it and to size the next blocks.
        # Blocks of constant lengths are soon as long as they can be.
        grows = prefetcher.source.data is None and not program.lengths
        growing = grows and (self._in_flight.length or 1) < program.capacity
        self._in_flight.settle(0 if self._in_flight.length is None or growing else MOST_IN_FLIGHT)

    def _count_call(
        self, program: Program, rows: Rows, signature: Signature, count: int, seconds: float
    ) -> None:
        """Counts the time of a call that differs from the one before, and may have compiled."""
        if program.compiles(rows, signature, count):
            self._clock.epoch.compile_s += seconds
        else:
            self._clock.epoch.dispatch_s += seconds

    def _limit(self, program: Program) -> int:
        """Returns how many iterations the next block may have."""
        room = self.room(min(program.capacity, self._in_flight.length or 1))
        if not self.quiet:
            firings = self._progress.firings
            self.quiet = block_length(self.watches, firings, max(room, _LOOK_AHEAD))
        return min(self.quiet, room)

    def room(self, most: int) -> int:
        """Returns how many of ``most`` iterations fit, apart from what handlers and time decide."""
        limit = self._prefetcher.limit
        room = most if limit is None else min(most, limit - self._progress.iteration)
        if self._observers.inside:
            room = min(room, _OBSERVED_ITERATIONS)
        return max(1, room)

    def _superbatch_length(self, program: Program, count: int, offset: int) -> int:
        """Returns how many batches to stack, ``offset`` iterations from now, after a block."""
        most = min(program.num_rows, self._in_flight.length or 1)
        if offset + most <= self.quiet:
            return most
        firings = self._progress.firings
        if not self._prefetcher.source.one_shot:
            return superbatch_length(self.watches, firings, offset, most)
        # An iterator is read no further than the next iteration at which a handler may run.
        if not offset:
            return count
        return block_length(self.watches, firings, offset + most) - offset

    # --- in flight -----------------------------------------------------------------------------

    def end_epoch_clock(self) -> EpochClock:
        """Ends the epoch's clock when the device finishes its last block, and returns it."""
        return self._clock.end_epoch(self._in_flight.end_epoch(self._clock.epoch))

    def settle(self, in_flight: int) -> None:
        """Waits until at most ``in_flight`` blocks are in flight."""
        self._in_flight.settle(in_flight)

    # --- recompilations ------------------------------------------------------------------------

    def _report_shape(self, known: Signature, signature: Signature) -> None:
        """Reports a batch whose shape requires another compilation of the step."""
        change = signature_change(known, signature)
        if self._options.strict:
            progress = self._progress
            raise RecompilationError(
                f"strict=True, but epoch {progress.epoch}, iteration {progress.iteration} would "
                f"recompile the step: {change}",
                fix=SAME_SHAPES,
            )
        self._signatures.add(known, signature)

    def recompile(self, step_state: PyTree, what: str) -> None:
        """Makes the program for a step state whose structure a handler changed.

        Raises:
            RecompilationError: The run is strict.
        """
        fix = "keep the structure, shapes and dtypes; Python numbers are cast to the old dtype"
        if self._options.strict:
            raise RecompilationError(what, fix=fix)
        if not self._warned:
            self._warned = True
            warnings.warn(f"{what}\n  fix: {fix}", stacklevel=2)
        if self.sample is not None:
            before = self.program
            self._refit_metrics(before, self.specialize(self.sample, step_state), what)

    def _refit_metrics(self, before: Program | None, program: Program, what: str) -> None:
        """Makes new accumulators if a change of the step state changed their shapes.

        Raises:
            StructureError: The epoch has already accumulated values of the old shapes.
        """
        progress = self._progress
        if before is not None and before.metrics.shapes == program.metrics.shapes:
            return
        begun = progress.iteration > 0 or progress.event is Event.ITERATION_COMPLETED
        if progress.place in IN_EPOCH and begun:
            raise StructureError(
                f"{what}; a metric of this epoch accumulates values of the old shapes",
                fix="change it between two epochs, or keep the shapes that metrics read",
            )
        self._carry.set_accumulators(self._fresh_accumulators(program))
