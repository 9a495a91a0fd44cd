"""Attaching the state of an earlier run: where it continues, its arrays, data and metrics.

    if has_ended(parts, state): ...         # nothing remains to be done
    sample = attach(parts, state)           # a sample of the data, or None
    fit_metrics(parts, state)               # once the program for the sample is known

The run continues right after the firing that the state belongs to.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import jax

from jaxloop._core.arrays import own, state_leaves
from jaxloop._core.batch import Batch
from jaxloop._core.bounds import Bounds, is_wider, is_within
from jaxloop._core.events import IN_EPOCH, ROWS, Event, Place
from jaxloop._core.lazy import LazyDict
from jaxloop._core.state import State
from jaxloop._data.position import FROM_COUNTERS
from jaxloop._engine import fitting
from jaxloop._engine.clock import now
from jaxloop._engine.parts import Parts
from jaxloop._program.block import Program
from jaxloop.errors import DataError, SerializationError

logger = logging.getLogger("jaxloop")


def has_ended(parts: Parts, state: State) -> bool:
    """Returns whether nothing remains to be done after ``state``. Warns if that may surprise."""
    bounds = parts.options.bounds
    done, step = state.epoch + _has_left_epoch(state), state.step
    if state.place is Place.END:
        # If the same script runs again, a finished run stays finished unless a bound increased. A
        # handler may have changed max_epoch, so the number that was passed is compared too.
        same = _has_same_epochs(bounds, state)
        more = not same and is_wider(bounds.epochs, state.max_epoch)
        stays = parts.spec.start is None and not (more or is_wider(bounds.steps, state.max_step))
        ended = stays or not bounds.has_epoch(done, step)
        too_many_epochs = not same and _exceeds(done, bounds.epochs)
        too_many_steps = _exceeds(step, bounds.steps)
    else:
        total = _total_epochs(parts, state)
        too_many_epochs = _exceeds(done + _is_open(state), total)
        too_many_steps = _exceeds(step + _begins_iteration(state), bounds.steps)
        ended = not bounds.is_empty and (too_many_epochs or too_many_steps)
    if ended and (too_many_epochs or too_many_steps) and not bounds.is_empty:
        asked = f"epochs={bounds.epochs}" if too_many_epochs else f"steps={bounds.steps}"
        warnings.warn(
            f"nothing remains to be done: {asked}, and the state to continue from has completed "
            f"{done if too_many_epochs else step}\n"
            f"  fix: pass the total number of {asked.split('=')[0]}, including earlier ones",
            stacklevel=2,
        )
    return ended


def _exceeds(count: int, bound: int | None) -> bool:
    """Returns whether a count is more than its bound."""
    return bound is not None and count > bound


def _begins_iteration(state: State) -> bool:
    """Returns whether an iteration of ``state`` has begun, or must begin as its epoch's first."""
    if state.place is Place.FETCH:
        return state.iteration == 0 and state.event is not Event.ITERATION_COMPLETED
    return state.place in (Place.EPOCH_STARTED, Place.ITERATION_STARTED, Place.STEP)


def _has_left_epoch(state: State) -> bool:
    """Returns whether the firing that ``state`` belongs to was the last of its epoch."""
    event, place = state.event, state.place
    return event is not None and place.value != event.value and ROWS[event].ends_epoch


def _is_open(state: State) -> bool:
    """Returns whether the epoch of ``state`` has begun or is about to, and has not ended."""
    row = ROWS.get(state.place)
    return state.place in IN_EPOCH if row is None else row.in_epoch or row.ends_epoch


def _has_same_epochs(bounds: Bounds, state: State) -> bool:
    """Returns whether the run of ``state`` was given the same ``epochs=``."""
    known = state.requested_epochs is not None or state.max_step is not None
    return known and bounds.epochs == state.requested_epochs


def _total_epochs(parts: Parts, state: State) -> int | None:
    """Returns the total number of epochs, which a handler of the earlier run may have changed."""
    bounds = parts.options.bounds
    return state.max_epoch or bounds.epochs if _has_same_epochs(bounds, state) else bounds.epochs


def ends_other_epochs(parts: Parts, state: State) -> bool:
    """Returns whether the run of ``state`` ended an epoch where this run would not, or may have."""
    cut_short = state.place is Place.END and not is_within(state.step, state.max_step)
    return cut_short or state.requested_iterations != parts.options.bounds.iterations


def attach(parts: Parts, state: State) -> Batch | None:
    """Continues right after the firing that ``state`` belongs to; returns a sample of the data."""
    progress, spec = parts.progress, parts.spec
    progress.from_state(state, parts.options.bounds)
    progress.max_epoch = _total_epochs(parts, state)
    if state.place is Place.END:
        progress.place = Place.NEXT_EPOCH
    elif state.status == "halted" and spec.start is not None:
        # `from_state` also continues from a halted state, whose epoch is over.
        progress.place = Place.NEXT_EPOCH
        progress.epoch, progress.iteration = state.epoch + 1, 0
    else:
        if state.status == "halted":
            progress.status, progress.halted_by = state.status, state.halted_by
        # A firing that was interrupted comes next, and starts again.
        if state.event is not None and state.place.value != state.event.value:
            row = ROWS[state.event]
            if row.ends_epoch and progress.epoch not in progress.lazy_history:
                # A handler of that firing kept the state, before the history was written.
                progress.lazy_history = progress.lazy_history.added(
                    progress.epoch, state.lazy_metrics
                )
            progress.leave(row)
    loan = state.loan
    carried = state_leaves(loan.step_state, "from_state: state.step_state"), loan.accumulators
    if spec.start is not None:  # no other code holds the arrays of a state that was just read
        carried = own(carried, often=spec.programs.starts())
    parts.carry.set(*carried)
    parts.clock.continue_epoch(state.elapsed_s)
    in_epoch = progress.place in IN_EPOCH
    if not in_epoch and not progress.has_epoch():
        return None
    consumed = _num_consumed(parts) if in_epoch else 0
    began = now()
    progress.max_iteration = parts.prefetcher.open(
        progress.epoch, progress.step - consumed, consumed, state.position or FROM_COUNTERS
    )
    if parts.source.reader.num_skipped:
        logger.info(
            "read past %d batches of epoch %d in %.3f s to reach the position of the earlier run",
            parts.source.reader.num_skipped,
            progress.epoch,
            now() - began,
        )
    if parts.source.one_shot and not is_within(progress.step, progress.max_step):
        return None  # the iterator may have no more batches, and another run may need the next one
    return parts.source.sample()


def fit_metrics(parts: Parts, state: State) -> None:
    """Continues the metrics of an epoch that ``state`` is in, or resets them between two epochs."""
    blocks, place = parts.blocks, parts.progress.place
    is_ending = place in ROWS and ROWS[place].ends_epoch
    if not is_ending and place not in IN_EPOCH:
        blocks.reset_metrics()
        return
    mine = fitting.meanings_of(parts.spec, blocks.program)
    has_begun = is_ending or _num_consumed(parts) > 0
    if has_begun:
        fitting.check_metrics(state, mine)
    if blocks.program is None:
        return
    _derive_metrics(parts, blocks.program, fitting.derived_changes(state, mine))
    if is_ending:
        return  # the other metrics in the state are final
    if not has_begun and fitting.metric_changes(state, mine):
        _renew_metrics(parts, blocks.program, state.metric_meanings or {})
    else:
        _continue_metrics(parts, blocks.program, by_dtype=fitting.packs_by_dtype(state))


def _derive_metrics(parts: Parts, program: Program, changed: set[str]) -> None:
    """Computes the derived metrics that differ from those of the state, which have no accumulator.

    A state of an earlier version may lack metrics to derive them from.
    """
    progress = parts.progress
    if not changed:
        return
    kept = {n: v for n, v in progress.lazy_metrics.get().items() if n not in changed}
    if all(slot.name in kept for slot in program.metrics.slots):
        known = {**program.metrics.with_derived(kept), **kept}
        progress.lazy_metrics = LazyDict(lambda: known)


def _renew_metrics(parts: Parts, program: Program, before: Mapping[str, Any]) -> None:
    """Starts new metrics in an epoch without an iteration. Values that handlers added stay."""
    progress = parts.progress
    values = progress.lazy_metrics.get()
    added = {name: value for name, value in values.items() if name not in before}
    parts.blocks.reset_metrics()
    known = {**program.values.fresh_values(), **added}
    progress.set_metrics(LazyDict(lambda: known), parts.blocks.metric_names)


def _continue_metrics(parts: Parts, program: Program, *, by_dtype: bool) -> None:
    """Continues the metrics of an epoch with accumulators from a state.

    Args:
        parts: The parts of the run.
        program: The program.
        by_dtype: See `Packing.restored`.

    Raises:
        SerializationError: The accumulators have other shapes.
    """
    # A checkpoint stores only the leaves. The metrics give the structure.
    accumulators = program.metrics.packing.restored(
        jax.tree.leaves(parts.carry.values[1]), by_dtype=by_dtype
    )
    if accumulators is None:
        raise SerializationError(
            "the state to resume from is in the middle of an epoch, and its accumulators do not "
            "match the metrics of this loop",
            fix="attach the same metrics or, if an earlier version of jaxloop wrote the state, "
            "finish the epoch with that version",
        )
    parts.carry.set_accumulators(parts.blocks.place.commit(accumulators))
    parts.progress.set_metrics(parts.progress.lazy_metrics, parts.blocks.metric_names)


def _num_consumed(parts: Parts) -> int:
    """Returns how many batches of an open epoch are consumed.

    Raises:
        DataError: They are more than the epoch may have.
    """
    progress, iterations = parts.progress, parts.options.bounds.iterations
    consumed = progress.iteration + (progress.place is Place.ITERATION_COMPLETED)
    if iterations is not None and consumed > iterations:
        raise DataError(
            f"the state to resume from is in the middle of epoch {progress.epoch}, after "
            f"{consumed} iterations, so iterations= must be at least {consumed}, got {iterations}",
            fix="finish the epoch with the iterations= of the earlier run, and change it after it",
        )
    return consumed
