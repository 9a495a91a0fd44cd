"""The walk: one flat loop over the table of `jaxloop._core.events`.

    for state in walk(parts, firing, give=True):    # one state per epoch
        ...

Between two firings, ``progress.place`` names the next row, so a state saved at any point resumes at
the right row. The order of statements matters where a comment says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

from jaxloop._core.events import ROWS, Event, Place
from jaxloop._core.interrupts import ENDED_BY_SIGNAL, Flag
from jaxloop._core.state import State
from jaxloop._engine.clock import now
from jaxloop._engine.firing import Firing
from jaxloop._engine.parts import Parts
from jaxloop.errors import ArgumentError, DataError

logger = logging.getLogger("jaxloop")

MAX_TIME = "max_time"
"""What halts a run whose time is over."""

_MOST_EMPTY = 1000
"""After so many epochs in a row without an iteration, a run that only steps bound raises."""


def walk(parts: Parts, firing: Firing, *, give: bool) -> Iterator[State]:
    """Runs to the end, or until a signal interrupts. If ``give``, yields a state per epoch."""
    try:
        yield from _rows(parts, firing, give)
    except ENDED_BY_SIGNAL:
        if parts.interrupts.flag.name is None:
            raise  # another run was interrupted
        _interrupt(parts, firing, parts.interrupts.flag.name)


def flush(parts: Parts) -> None:
    """Shows the observers what is queued. If one runs a loop that a signal ends, the others see it.

    An observer that is not shown here would miss its firing, because a resumed run is past it.
    """
    while True:
        try:
            parts.observers.flush()
            return
        except ENDED_BY_SIGNAL:
            if parts.interrupts.flag.name is None:
                raise  # another run was interrupted


def _interrupt(parts: Parts, firing: Firing, name: str) -> None:
    """Ends a run at a signal, or when its time is over, with its state saved."""
    progress, interrupts = parts.progress, parts.interrupts
    if not interrupts.nested:
        logger.warning(
            "%s: the run ends here with the status 'interrupted', in epoch %d after step %d; %s",
            name,
            progress.epoch,
            progress.step,
            _what_is_next(interrupts.flag),
        )
    progress.status, progress.halted_by = "interrupted", name
    flush(parts)
    halted = ROWS[Place.HALTED]
    try:
        firing.fire(halted, then=progress.place)
    except ENDED_BY_SIGNAL:
        # A handler began a run, which ended at once. The state must be saved all the same.
        firing.fire(halted, then=progress.place, handlers=False)


def _what_is_next(flag: Flag) -> str:
    if flag.terminates:
        return "then the script ends"
    return "run it again to continue" if flag.name is None else "a second Ctrl-C stops at once"


def _rows(parts: Parts, firing: Firing, give: bool) -> Iterator[State]:
    progress, prefetcher, blocks = parts.progress, parts.prefetcher, parts.blocks
    interrupts, savers = parts.interrupts, parts.savers
    rows, fire, silent = ROWS, firing.fire, firing.silent
    fetch, step, started = Place.FETCH, Place.STEP, Place.ITERATION_STARTED
    last_step, num_empty = progress.step, 0
    timed = parts.options.max_time_s is not None
    is_over = functools.partial(_is_over, parts, progress.step)
    fire(rows[Place.STARTED], then=progress.place)
    while (place := progress.place) is not Place.END:
        if place is fetch:
            # Polled before the batch is consumed, so that an interrupt does not lose it.
            if interrupts.flag.name is not None:
                interrupts.poll()
            if savers.open_stores:
                savers.poll()
            if timed and is_over():
                return _interrupt(parts, firing, MAX_TIME)
            more = _has_iteration(parts)
            progress.place = started if more else Place.EPOCH_COMPLETED
        elif place is step:
            blocks.dispatch()
        elif place is Place.NEXT_EPOCH:
            # Polled after the last epoch too. A resumed run then only has to complete.
            interrupts.poll()
            more = progress.has_epoch()
            if more and is_over():
                return _interrupt(parts, firing, MAX_TIME)
            progress.place = Place.EPOCH_STARTED if more else Place.COMPLETED
        else:
            row = rows[place]
            if row.event in silent:
                progress.pass_by(row)
                continue
            if row.event is Event.EPOCH_STARTED:
                _open_epoch(parts)
            fire(row)
            if row.ends_epoch:
                # After SIGTERM, the caller gets no more epochs: `Terminated` has the state.
                if give and not interrupts.flag.terminates:
                    parts.observers.flush()
                    began = now()
                    with interrupts.paused():  # the caller's code runs
                        yield parts.state()
                    parts.clock.leave_out(now() - began)
                    parts.carry.reclaim()
                progress.leave(row)
                prefetcher.close_epoch()
                num_empty = num_empty + 1 if progress.step == last_step else 0
                last_step = progress.step
                if progress.max_epoch is None and num_empty >= _MOST_EMPTY:
                    raise _never_ends(progress.max_step)


def _is_over(parts: Parts, first_step: int) -> bool:
    """Returns whether the time of the run is over. A run that made no progress continues."""
    most_s = parts.options.max_time_s
    if most_s is None or parts.progress.step == first_step:
        return False
    return now() - parts.clock.began_s > most_s


def _never_ends(steps: int | None) -> ArgumentError:
    return ArgumentError(
        f"run: steps={steps} must be within reach, got {_MOST_EMPTY:,} epochs in a row that "
        "a handler halted before their first iteration",
        fix="pass epochs= too, or let the handler return 'halt_loop'",
    )


def _open_epoch(parts: Parts) -> None:
    progress, blocks = parts.progress, parts.blocks
    parts.activity.now = ("while opening the data of epoch {}", progress.epoch)
    parts.clock.begin_epoch()
    blocks.quiet = 0
    progress.begin_epoch(parts.prefetcher.open(progress.epoch, progress.step))
    if blocks.program is None:
        # The run resumed at the end of an epoch's data, so this is its first batch.
        sample = parts.source.sample()
        if sample is not None:
            blocks.specialize(sample, parts.carry.step_state)
    blocks.reset_metrics()


def _has_iteration(parts: Parts) -> bool:
    """Returns whether this epoch has another iteration."""
    progress, limit = parts.progress, parts.prefetcher.limit
    if limit is not None and progress.iteration >= limit:
        return False
    if parts.prefetcher.num_ready:
        return True
    parts.activity.now = (
        "while reading the data of epoch {} before iteration {}",
        progress.epoch,
        progress.iteration,
    )
    began = now()
    more = parts.prefetcher.has_more()
    parts.clock.epoch.data_s += now() - began
    if not more:
        _check_end(parts)
    return more


def _check_end(parts: Parts) -> None:
    """Raises if the data of an epoch end too early."""
    progress, source = parts.progress, parts.source
    if progress.iteration == 0 and not source.one_shot:
        raise DataError(
            f"run: the data of epoch {progress.epoch} must have at least one batch, got empty data",
            fix="pass a re-iterable (a list, jl.batches) instead of one that is used up",
        )
    if source.one_shot and parts.options.bounds.needs_batches:
        iterations, limit = parts.options.bounds.iterations, parts.prefetcher.limit
        by = "iterations=" if limit == iterations else ""
        raise DataError(
            f"run: epoch {progress.epoch} must have {by}{limit} batches, got "
            f"{progress.iteration}; the one-shot iterator ended after {source.reader.num_read} "
            "batches",
            fix="pass fewer epochs, iterations or steps, or a re-iterable",
        )
