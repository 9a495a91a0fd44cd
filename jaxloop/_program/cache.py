"""A loop's memory of its programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxloop._core.arrays import abstract, state_signature
from jaxloop._core.batch import Batch
from jaxloop._core.checks import jit_options
from jaxloop._core.types import PyTree
from jaxloop._program.block import Program
from jaxloop._program.sizing import capacity_of, rows_of
from jaxloop._program.step import Step
from jaxloop.metrics.binding import bind
from jaxloop.metrics.declare import MetricSpec


class Programs:
    """A loop's memory of its programs, so that a second run compiles nothing."""

    def __init__(self) -> None:
        self._programs: dict[Any, Program] = {}
        self._inits: dict[Any, Any] = {}
        self.numbers: dict[Any, Any] = {}
        """Small integers that are on a device already."""

    def specialize(
        self,
        step_fn: Callable[[PyTree, PyTree], PyTree],
        specs: tuple[MetricSpec, ...],
        batch: Batch,
        state: PyTree,
        *,
        fuse: int | str,
        jit: bool | Mapping[str, Any],
    ) -> Program:
        """The program for a step, metrics, a first batch and a state.

        Raises:
            StructureError: The step changes its state.
        """
        options = jit_options(jit)
        key = (batch.signature, state_signature(state), fuse, repr(options))
        if key in self._programs:
            return self._programs[key]
        step = Step(step_fn, eager=options is None)
        shapes = abstract(batch.value)
        jaxpr, (new, outputs) = step.trace(shapes, state)
        metrics = bind(specs, outputs, new, shapes)
        capacity = (
            1 if options is None else capacity_of(jaxpr, shapes, jax.eval_shape(metrics.init), fuse)
        )
        program = Program(step, metrics, capacity, rows_of(capacity, shapes), options)
        self._programs[key] = program
        return program

    def init(self, init_fn: Callable[..., PyTree], jit: bool) -> Callable[..., PyTree]:
        """``init_fn`` under `jax.jit`, made once."""
        if not jit:
            return init_fn
        if init_fn not in self._inits:
            self._inits[init_fn] = jax.jit(init_fn)
        return self._inits[init_fn]
