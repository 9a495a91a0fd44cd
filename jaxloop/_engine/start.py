"""The start of a run: a sample of the data, then init, resume or attach.

    ended = begin(parts, init_state)        # a `State` if the run has already ended, else None

Every mistake that can be found before the first step raises here.
"""

from __future__ import annotations

import dataclasses
import functools
import uuid
from typing import Any

from jaxloop._core.arrays import abstract
from jaxloop._core.batch import Batch
from jaxloop._core.events import Place
from jaxloop._core.lazy import Constant
from jaxloop._core.placement import check_axes, check_processes
from jaxloop._core.sessions import Sessions
from jaxloop._core.state import Snapshot, State, make
from jaxloop._data.source import KEEPS_POSITION, no_batch
from jaxloop._engine import fitting
from jaxloop._engine.attaching import attach, ends_other_epochs, fit_metrics, has_ended
from jaxloop._engine.first_state import make_step_state, step_state_like
from jaxloop._engine.parts import Parts
from jaxloop._engine.watched import check_watched_metrics, known_better, warn_of_unknown
from jaxloop._spec import Acting, CheckpointTrigger, Handler, Observer, RunStart
from jaxloop.errors import DataError


def begin(parts: Parts, init_state: Any) -> State | None:
    """Makes or restores the state, and makes every check that is possible before the first step.

    Returns:
        The final state if the run has already ended, or None.
    """
    spec = parts.spec
    _check(parts)
    statics = fitting.statics_of(spec)
    state, sample = spec.start, None
    if state is None:
        sample = _read_sample(parts)
        state = _saved_state(parts, sample, init_state)
    if state is None:
        assert sample is not None
        jit = parts.options.jit is not None
        step_state = make_step_state(spec, sample, init_state, jit=jit)
        parts.carry.set(step_state, {})
        parts.activity.first_state = parts.state
        _specialize(parts, sample)
        parts.blocks.reset_metrics()
    else:
        parts.activity.first_state = Constant(state).get
        fitting.check_statics(state, statics)
        if has_ended(parts, state):
            parts.progress.place = Place.END
            return state
        sample = attach(parts, state)
    parts.progress.statics = statics
    parts.savers.last_checkpoint = parts.progress.last_checkpoint
    parts.progress.environment = fitting.compared_environment(state, parts.carry.step_state)
    if spec.start is not None or parts.progress.run_id is None:
        # A run that starts from a state is a run of its own, which owns none of the checkpoints.
        parts.progress.run_id, parts.progress.first_step = uuid.uuid4().hex, parts.progress.step
    elif state is not None and ends_other_epochs(parts, state):
        parts.progress.first_step = state.step
    parts.progress.lazy_sessions = Sessions(
        parts.progress.sessions, parts.progress.step, parts.clock
    )
    if state is not None:
        if sample is not None:
            _specialize(parts, sample)
        fit_metrics(parts, state)
    _open_handlers(parts, sample)
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
    check_processes()
    spec = parts.spec
    check_watched_metrics(spec)
    if not parts.source.keeps_position and spec.triggers():
        raise DataError(
            "checkpoint: the data must have a position that can be saved, got a one-shot iterator; "
            "a killed run could not resume",
            fix=KEEPS_POSITION,
        )
    for one in spec.attachments:
        if isinstance(one, Acting | Observer) and one.check is not None:
            one.check(spec)


# --- the first state -----------------------------------------------------------------------------


def _read_sample(parts: Parts) -> Batch:
    parts.progress.max_iteration = parts.prefetcher.open(epoch=0, step=0)
    sample = parts.source.sample()
    if sample is None:
        raise no_batch("run: data")
    return sample


def _saved_state(parts: Parts, sample: Batch, init_state: Any) -> State | None:
    """Returns the state to resume from, or None if the run starts afresh."""
    spec, jit = parts.spec, parts.options.jit is not None
    if spec.resume_path is None:
        return None
    # Imported here, because most loops never read a checkpoint.
    from jaxloop._checkpoint.reader import load_latest

    like = functools.partial(step_state_like, spec, sample, init_state, jit=jit)
    state = load_latest(spec.resume_path, like)
    if state is not None:
        parts.prefetcher.close_epoch()
    return state


def _specialize(parts: Parts, sample: Batch) -> None:
    """Finds the program for the sample. The shapes of step, loss and metrics are checked here."""
    parts.activity.now = ("while checking the step and its metrics on the first batch",)
    check_axes(parts.carry.step_state)
    program = parts.blocks.specialize(sample, parts.carry.step_state)
    if parts.blocks.place.committed:
        parts.carry.set(*parts.blocks.place.commit(parts.carry.values))
    if parts.spec.task is not None:
        parts.spec.task.check_data(parts.source.iterable, program.reported)
    if program.metrics.derived:
        program.values.fresh_values()  # raises if a function does not take the values
    # Again, because the names of a metric of several outputs depend on the outputs.
    check_watched_metrics(parts.spec, parts.blocks.metric_names)


def run_start(parts: Parts, sample: Batch | None) -> RunStart:
    """Returns what is known right before the first event."""
    program, names = parts.blocks.program, parts.blocks.metric_names
    return RunStart(
        parts.spec,
        make(Snapshot, parts.progress.to_snapshot()),
        abstract(parts.carry.step_state),
        {} if program is None else program.values.value_shapes,
        parts.source.iterable,
        None if sample is None else sample.value,
        known_better(parts.spec, names),
        nested=parts.interrupts.nested,
        max_time_s=parts.options.max_time_s,
        run_id=parts.progress.run_id or "",
        shared=parts.shared,
    )


def _open_handlers(parts: Parts, sample: Batch | None) -> None:
    """Lets handlers check what they need, and prepare it, now that the first state is known."""
    spec = parts.spec
    openable = [one for one in spec.attachments if isinstance(one, Handler | CheckpointTrigger)]
    if all(one.open is None for one in openable):
        return
    program, names = parts.blocks.program, parts.blocks.metric_names
    start = run_start(parts, sample)
    for one in openable:
        parts.activity.now = ("while preparing the handler `{}`", one.name)
        if isinstance(one, Handler) and one.open is not None:
            parts.opened[id(one)] = opened = one.open(start)
            parts.observers.close_too(opened)
        elif isinstance(one, CheckpointTrigger) and one.open is not None:
            parts.deciding[id(one)] = one.open(start)
        # Again, because opening a handler may show which metrics it adds.
        start = dataclasses.replace(start, better=known_better(spec, names))
    parts.activity.now = ("while checking the metrics that handlers read",)
    if program is not None:
        check_watched_metrics(spec, names)
    warn_of_unknown(openable, start)
