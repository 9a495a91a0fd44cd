"""The parts of a run, made together.

    parts = Parts.of(spec, data, options)
    state = parts.state()

Each part owns its fields, and no other part writes them except through its methods.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxloop._core.interrupts import Interrupts
from jaxloop._core.state import State
from jaxloop._data.prefetch import Prefetcher
from jaxloop._data.source import DataSource
from jaxloop._engine.activity import Activity, TracedActivity
from jaxloop._engine.blocks import Blocks
from jaxloop._engine.carry import Carry
from jaxloop._engine.clock import RunClock, now
from jaxloop._engine.observers import Observers
from jaxloop._engine.options import RunOptions
from jaxloop._engine.progress import Progress
from jaxloop._engine.saving import Savers
from jaxloop._spec import DecideFn, Handler, HandlerFn, LoopSpec


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Parts:
    """The parts of a run.

    Attributes:
        spec: The loop.
        options: The options of the run.
        interrupts: The signals that end it.
        activity: The record of what it is doing.
        clock: The measurement of its time.
        progress: The mutable form of `State`.
        carry: The step state and the accumulators.
        source: The user's data.
        prefetcher: The reader that works ahead of the device.
        observers: The observers and the firings that they have not seen yet.
        blocks: The program and its blocks.
        savers: The stores and the requested saves.
        opened: The functions of handlers that were opened for this run, by the handler's id.
        deciding: The same, for checkpoint triggers.
        shared: What attachments share with each other in this run.
    """

    spec: LoopSpec
    options: RunOptions
    interrupts: Interrupts
    activity: Activity
    clock: RunClock
    progress: Progress
    carry: Carry
    source: DataSource
    prefetcher: Prefetcher
    observers: Observers
    blocks: Blocks
    savers: Savers
    opened: dict[int, HandlerFn] = dataclasses.field(default_factory=dict)
    deciding: dict[int, DecideFn] = dataclasses.field(default_factory=dict)
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, spec: LoopSpec, data: Any, options: RunOptions) -> Parts:
        """Makes the parts of a run.

        Raises:
            ArgumentError: The data do not fit the options.
            ArgumentTypeError: ``data`` is not iterable.
        """
        traced = any(isinstance(one, Handler) and one.traces for one in spec.attachments)
        activity = TracedActivity() if traced else Activity()
        interrupts, clock = Interrupts(), RunClock()
        source = DataSource(data, options.bounds, interrupts)
        prefetcher = Prefetcher(source)
        progress = Progress(options.bounds)
        carry = Carry(donates=options.jit is not None)
        observers = Observers(spec.attachments, progress, clock, activity)
        blocks = Blocks(spec, options, progress, carry, prefetcher, observers, clock, activity)
        savers = Savers(spec)
        return cls(
            spec,
            options,
            interrupts,
            activity,
            clock,
            progress,
            carry,
            source,
            prefetcher,
            observers,
            blocks,
            savers,
        )

    def state(self) -> State:
        """Returns the run as a `State`. The carry is on loan until it is reclaimed."""
        elapsed_s = now() - self.clock.epoch.began_s
        if self.savers.open_stores:
            self.savers.note_complete()
        self.progress.last_checkpoint = self.savers.last_checkpoint
        return self.progress.to_state(self.carry.lend, self.prefetcher.position(), elapsed_s)
