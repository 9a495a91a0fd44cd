"""The start of a run: a sample of the data, then init, resume or attach.

    ended = begin(parts, init_state)        # a `State` if the run has already ended, else None

Every mistake that can be found before the first step raises here.
"""

from __future__ import annotations

import logging
import uuid
from typing import Any

from jaxloop._core.arrays import as_state, copy, put
from jaxloop._core.batch import Batch
from jaxloop._core.events import IN_EPOCH, ROWS, Place
from jaxloop._core.state import State
from jaxloop._core.step_result import split_emission
from jaxloop._core.types import PyTree
from jaxloop._data.position import FROM_COUNTERS
from jaxloop._data.source import KEEPS_POSITION
from jaxloop._engine.clock import now
from jaxloop._engine.parts import Parts
from jaxloop._spec import Handler, LoopSpec, PreparedInit
from jaxloop.errors import DataError, missing_metric

logger = logging.getLogger("jaxloop")


def begin(parts: Parts, init_state: Any) -> State | None:
    """Makes or restores the state, and makes every check that is possible before the first step.

    Returns:
        The final state if the run has already ended, or None.
    """
    spec = parts.spec
    _check(parts)
    state, sample = spec.start, None
    if state is None:
        sample = _read_sample(parts)
        step_state = _init(parts, sample, init_state)
        if spec.resume_path is not None:
            # Imported here, because most loops never read a checkpoint.
            from jaxloop._checkpoint.reader import load_latest

            state = load_latest(spec.resume_path, step_state)
        if state is None:
            parts.carry.set(step_state, {})
        else:
            parts.prefetcher.close_epoch()
    if state is not None:
        if _has_ended(parts, state):
            parts.progress.place = Place.END
            return state
        sample = _attach(parts, state)
    if spec.start is not None or parts.progress.run_id is None:
        # A run that starts from a state is a run of its own, which owns none of the checkpoints.
        parts.progress.run_id = uuid.uuid4().hex
    if sample is not None:
        _specialize(parts, sample)
    _check_names(parts)
    return None


def _check_names(parts: Parts) -> None:
    """Checks the names that triggers give to checkpoints, as far as the first state shows them."""
    checks = [one.check_state for one in parts.spec.triggers() if one.check_state is not None]
    if checks:
        state = parts.state()
        for check_state in checks:
            check_state(state)
        del state
        parts.carry.reclaim()


# --- checks --------------------------------------------------------------------------------------


def _check(parts: Parts) -> None:
    spec = parts.spec
    _check_watched_metrics(spec)
    if not parts.source.keeps_position and spec.triggers():
        raise DataError(
            "checkpoint: the data must have a position that can be saved, got a one-shot iterator; "
            "a killed run could not resume",
            fix=KEEPS_POSITION,
        )
    for one in spec.acting():
        if one.check is not None:
            one.check(spec)


def _check_watched_metrics(spec: LoopSpec) -> None:
    """Raises if a watched metric cannot exist when it is read.

    A user's own handler may add any metric. If one runs before the read, this raises nothing.
    """
    declared = {one.name for one in spec.metrics}
    for index, one in enumerate(spec.attachments):
        known, unknowable = set(declared), False
        for position, other in enumerate(spec.attachments):
            same = bool(set(other.events) & set(one.events))
            if position == index or (same and position > index) or not isinstance(other, Handler):
                continue
            unknowable |= other.adds is None
            known |= set(other.adds or ())
        for name in getattr(one, "watches", ()):
            if name not in known and not unknowable:
                raise missing_metric(one.name, name, known)


# --- the first state -----------------------------------------------------------------------------


def _read_sample(parts: Parts) -> Batch:
    parts.progress.max_iteration = parts.prefetcher.open(0, 0)
    sample = parts.source.sample()
    if sample is None:
        raise DataError(
            "run: data must have at least one batch, got empty data", fix="pass at least one batch"
        )
    return sample


def _init(parts: Parts, sample: Batch, init_state: Any) -> PyTree:
    spec = parts.spec
    if spec.init_fn is None:
        return copy(as_state({} if init_state is None else init_state, "run(init_state=)"))
    jit, init_fn = parts.options.jit is not None, spec.init_fn
    if isinstance(init_fn, PreparedInit):
        init = spec.programs.init(init_fn.fn, jit=jit)
        prepared = init_fn.prepare(init_state)
        state, evidence = init(put(sample.value), put(prepared))
        init_fn.check(evidence)
    else:
        init = spec.programs.init(init_fn, jit=jit)
        state, _ = split_emission(init(put(sample.value), put(init_state)))
    return copy(as_state(state, "the result of init_fn"))


# --- the state of an earlier run -----------------------------------------------------------------


def _has_ended(parts: Parts, state: State) -> bool:
    """Returns whether nothing remains to be done after ``state``."""
    if state.place is not Place.END:
        return False
    epochs = parts.options.epochs
    if state.epoch >= epochs:
        return True
    # If the same script runs again, a finished run stays finished unless epochs increased.
    return parts.spec.start is None and epochs <= (state.max_epoch or 0)


def _attach(parts: Parts, state: State) -> Batch | None:
    """Continues right after the firing that ``state`` belongs to; returns a sample of the data."""
    progress, spec = parts.progress, parts.spec
    progress.from_state(state)
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
    parts.carry.set(
        copy(as_state(loan.step_state, "from_state: state.step_state")), copy(loan.accumulators)
    )
    parts.clock.continue_epoch(state.elapsed_s)
    in_epoch = progress.place in IN_EPOCH
    if not in_epoch and progress.epoch >= parts.options.epochs:
        return None
    consumed = 0
    if in_epoch:
        consumed = progress.iteration + (progress.place is Place.ITERATION_COMPLETED)
    began = now()
    progress.max_iteration = parts.prefetcher.open(
        progress.epoch, consumed, state.position or FROM_COUNTERS
    )
    if parts.source.reader.num_skipped:
        logger.info(
            "read past %d batches of epoch %d in %.3f s to reach the position of the earlier run",
            parts.source.reader.num_skipped,
            progress.epoch,
            now() - began,
        )
    return parts.source.sample()


def _specialize(parts: Parts, sample: Batch) -> None:
    """Finds the program for the sample. The shapes of step, loss and metrics are checked here."""
    parts.activity.now = ("while checking the step and its metrics on the first batch",)
    place = parts.progress.place
    parts.blocks.specialize(sample, parts.carry.step_state)
    if place in IN_EPOCH:
        parts.blocks.continue_metrics()
    elif place not in ROWS or not ROWS[place].ends_epoch:
        parts.blocks.reset_metrics()
