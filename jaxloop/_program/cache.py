"""The cache of a loop's programs, so that a second run compiles nothing.

    cache = ProgramCache()
    program = cache.specialize(step_fn, specs, batch, state, fuse="auto", options={})

The cache belongs to one step and one set of metrics. A loop that changes either gets a new cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxloop._core.arrays import abstract, state_signature
from jaxloop._core.batch import Batch
from jaxloop._core.placement import devices_of
from jaxloop._core.types import Fuse, PyTree
from jaxloop._data.prefetch import Reusable
from jaxloop._program.block import Program
from jaxloop._program.fold import Fold
from jaxloop._program.sizing import capacity_of, rows_of, static_lengths
from jaxloop._program.step import Step
from jaxloop.metrics.binding import bind
from jaxloop.metrics.declare import MetricSpec
from jaxloop.metrics.meaning import meanings_of

_FEW_STARTS = 32
"""Compiling a copy of a state takes about as long as it saves in so many runs."""


class ProgramCache:
    """The programs of a loop.

    Attributes:
        reusable: What a run leaves to the next one.
        block_lengths: The preferred number of iterations in a block, by program or fold. The engine
            measures it and stores it here for the next run. The programs themselves use no clock.
    """

    def __init__(self) -> None:
        self._programs: dict[Any, Program] = {}
        self._folds: dict[Program, Fold] = {}
        self._inits: dict[Any, Any] = {}
        self._num_starts = 0
        self.reusable = Reusable()
        self.block_lengths: dict[Any, int] = {}

    def specialize(
        self,
        step_fn: Callable[[PyTree, PyTree], PyTree],
        specs: tuple[MetricSpec, ...],
        batch: Batch,
        state: PyTree,
        *,
        fuse: Fuse,
        options: dict[str, Any] | None,
    ) -> Program:
        """Returns the program for a step, metrics, a first batch and a state.

        Args:
            step_fn: The step.
            specs: The declared metrics.
            batch: The first batch.
            state: The step state.
            fuse: See `run`.
            options: The options for `jax.jit`. If None, the program runs op by op.

        Raises:
            StructureError: The step changes its state.
            ShapeError: A metric does not fit what the step reports.
        """
        platform = devices_of(state)[0].platform
        key = (batch.signature, state_signature(state), fuse, repr(options), platform)
        if key in self._programs:
            return self._programs[key]
        eager = options is None
        step = Step(step_fn, eager=eager)
        shapes = abstract(batch.value)
        jaxpr, (new, outputs) = step.trace(shapes, state)
        metrics = bind(specs, outputs, new, shapes)
        accumulators = metrics.empty
        capacity = 1 if eager else capacity_of(jaxpr, shapes, accumulators, fuse, platform)
        program = Program(
            step,
            metrics,
            capacity,
            rows_of(capacity, shapes),
            options,
            tuple(outputs),
            meanings_of(specs, accumulators),
            static_lengths(platform, capacity),
        )
        self._programs[key] = program
        return program

    def fold(self, program: Program, batch: PyTree, state: PyTree) -> Fold:
        """Returns the executable of an evaluation with the step and the metrics of a program.

        Args:
            program: The program, for the same arguments. It is not compiled.
            batch: The first batch, or its shapes.
            state: The step state.
        """
        if program not in self._folds:
            shapes, platform = abstract(batch), devices_of(state)[0].platform
            jaxpr, _ = program.step.trace(shapes, state)
            # Without a ring, the accumulators take no memory.
            capacity = capacity_of(jaxpr, shapes, {}, "auto", platform)
            self._folds[program] = Fold(
                program.step,
                program.metrics,
                jax.tree.structure(state),
                capacity=capacity,
                num_rows=rows_of(capacity, shapes),
                lengths=static_lengths(platform, capacity),
            )
        return self._folds[program]

    def init(self, init_fn: Callable[..., Any], compiled: Callable[..., Any]) -> Any:
        """Returns ``compiled``, which calls ``init_fn``, wrapped in `jax.jit`.

        Each call with the same ``init_fn`` returns the same object.
        """
        if init_fn not in self._inits:
            self._inits[init_fn] = jax.jit(compiled)
        return self._inits[init_fn]

    def starts(self) -> bool:
        """Counts the start of a run, and returns whether runs of this loop start often."""
        self._num_starts += 1
        return self._num_starts > _FEW_STARTS
