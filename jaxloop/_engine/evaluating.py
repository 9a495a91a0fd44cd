"""Evaluations inside a run: the metrics of a step over data, and nothing else.

    values = evaluate(spec, data, step_state)       # {"loss": array(0.3, dtype=float32)}

A run of the loop would give the same values. This has no events, handlers or `State`, so it starts
in a fraction of the time, and its program keeps no metrics of single iterations. An evaluation that
a signal ends leaves nothing, because it is repeated from its start.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxloop._core.arrays import as_state, put
from jaxloop._core.batch import Batch
from jaxloop._core.bounds import Bounds
from jaxloop._core.interrupts import ENDED_BY_SIGNAL, Interrupts
from jaxloop._core.placement import placement
from jaxloop._core.types import PyTree
from jaxloop._data.prefetch import PATIENCE_S, Prefetcher
from jaxloop._data.source import DataSource, no_batch
from jaxloop._engine.activity import Activity
from jaxloop._engine.clock import now
from jaxloop._engine.in_flight import MOST_IN_FLIGHT, Block, InFlight
from jaxloop._engine.signatures import Signatures
from jaxloop._spec import LoopSpec
from jaxloop.errors import JaxloopError


def evaluate(
    spec: LoopSpec, data: Any, step_state: PyTree, iterations: int | None = None
) -> dict[str, Any]:
    """Returns the metrics of a loop for one epoch of the data, as NumPy values.

    Args:
        spec: The loop. Only its step and its metrics are used.
        data: A re-iterable of batches, an iterator, or a function ``epoch -> iterable``.
        step_state: The step state. It is not changed, and its arrays are not donated.
        iterations: The maximum number of batches to evaluate, or None for all.

    Raises:
        DataError: The data are empty or unsuitable.
        Interrupted: A signal arrived, which ends the run too.
    """
    one = _Evaluation(spec, data, Bounds(1, iterations, None))
    try:
        with one.interrupts, one.prefetcher:
            with one.interrupts.waiting:
                one.begin(step_state)
            return one.finish()
    except BaseException as error:
        one.explain(error)
        raise


class _Evaluation:
    """One evaluation.

    Args:
        spec: The loop.
        data: The data.
        bounds: One epoch, and how long that may be.
    """

    def __init__(self, spec: LoopSpec, data: Any, bounds: Bounds) -> None:
        self._spec = spec
        self.interrupts = Interrupts()
        self._source = DataSource(data, bounds, self.interrupts)
        self.prefetcher = Prefetcher(self._source)
        self._activity = Activity()
        self._in_flight = InFlight()
        self._signatures = Signatures()
        self._begun = False

    def explain(self, error: BaseException) -> None:
        """Adds a note to an error that says where it happened."""
        expected = ENDED_BY_SIGNAL if self._begun else (JaxloopError, *ENDED_BY_SIGNAL)
        if not isinstance(error, expected):
            error.add_note(f"jaxloop: {self._activity}")

    def begin(self, step_state: PyTree) -> None:
        """Opens the data, and finds or makes the executable."""
        self._activity.now = ("while reading the first batch",)
        self.prefetcher.open(epoch=0, step=0)
        sample = self._sample()
        self._activity.now = ("while checking the step and its metrics on the first batch",)
        state, programs = _strong(step_state), self._spec.programs
        self._program = program = programs.specialize(
            self._spec.step_fn, self._spec.metrics, sample, state, fuse="auto", options={}
        )
        self._fold = fold = programs.fold(program, sample.value, state)
        self._in_flight.use(fold, programs.block_lengths)
        self._known, place = sample.signature, placement(state)
        self.prefetcher.configure(fold.num_rows, place, programs.reusable)
        self._packed = place.commit(program.values.init())
        leaves = place.commit(jax.tree.leaves(state))
        # The first window takes scalars from the host only together with fresh accumulators.
        self._leaves = leaves if program.values.on_host else put(leaves)
        self._begun = True

    def _sample(self) -> Batch:
        sample = self._source.sample_shapes()
        if sample is None:
            raise no_batch("run: data")
        return sample

    def finish(self) -> dict[str, Any]:
        """Evaluates all batches, and returns the values."""
        prefetcher, interrupts, activity = self.prefetcher, self.interrupts, self._activity
        iteration, limit = 0, prefetcher.limit
        while limit is None or iteration < limit:
            interrupts.poll()
            activity.now = ("while reading the data of epoch 0 from iteration {} on", iteration)
            if not (prefetcher.num_ready or prefetcher.has_more()):
                break
            iteration += self._dispatch(iteration)
        activity.now = ("while waiting for the metrics",)
        self._in_flight.settle(0)
        interrupts.poll()
        prefetcher.keep_buffers()
        values: dict[str, Any] = self._program.values.of_last(self._packed)
        return values

    def _dispatch(self, iteration: int) -> int:
        """Evaluates the next batches, and returns how many these are."""
        fold, prefetcher, in_flight = self._fold, self.prefetcher, self._in_flight
        limit = in_flight.length or 1
        if not prefetcher.num_ready:
            began = now()
            prefetcher.read(min(fold.num_rows, limit), lambda: now() - began > PATIENCE_S)
        window = prefetcher.take(fold.cut(min(limit, prefetcher.num_ready)))
        superbatch, count = window.superbatch, window.length
        if superbatch.signature is not self._known and superbatch.signature != self._known:
            self._signatures.add(self._known, superbatch.signature)
        last = iteration + count - 1
        self._activity.now = ("in the step, epoch 0, iterations {} to {}", iteration, last)
        self._leaves, self._packed, marker = fold.run(
            self._leaves, self._packed, window.rows, window.start, window.bound, count
        )
        superbatch.marker = marker
        in_flight.blocks.append(Block(marker, count, now()))
        # While the time of a step is unknown, waits to measure it.
        in_flight.settle(0 if in_flight.length is None else MOST_IN_FLIGHT)
        return count


def _strong(step_state: PyTree) -> PyTree:
    """Returns the state with strongly typed arrays. Scalars of NumPy stay where they are."""
    for leaf in jax.tree.leaves(step_state):
        strong = isinstance(leaf, jax.Array) and not getattr(leaf, "weak_type", False)
        if not strong and not isinstance(leaf, np.generic):
            return as_state(step_state, "the state of the evaluation")
    return step_state
