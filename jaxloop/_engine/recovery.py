"""Recovery: what a run does if a guard finds a problem, if an error ends it, and when it closes.

    recovery = Recovery(parts)
    recovery.rescue(guard, "not finite: step_state['w']")   # halt, or rewind
    recovery.explain(error)                 # says where it happened, and keeps the last good state
    recovery.close(error)                   # closes observers and stores

The error that ends a run is raised unchanged. Later failures are added as notes and never hide it.
After SIGTERM, the run raises `Terminated` instead, so that the script ends.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable

import jax

from jaxloop._core.arrays import own
from jaxloop._core.events import IN_EPOCH
from jaxloop._core.interrupts import ENDED_BY_SIGNAL
from jaxloop._core.lazy import ReadOnlyDict
from jaxloop._core.state import State
from jaxloop._engine.clock import now
from jaxloop._engine.fitting import packs_by_dtype
from jaxloop._engine.parts import Parts
from jaxloop._spec import Guard, GuardAction
from jaxloop.errors import CheckpointError, JaxloopError

logger = logging.getLogger("jaxloop")


class Recovery:
    """The part of a run that handles problems and errors, and closes the run.

    Args:
        parts: The parts of the run.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def rescue(self, guard: Guard, problem: str) -> bool:
        """Rewinds to the newest checkpoint if the guard asks for it and a checkpoint exists.

        The step state, the accumulators and the handlers' memories are restored. The counters and
        the data are not, so the run skips the bad part.

        Returns:
            Whether the run was rewound. If not, it must halt.
        """
        parts, progress = self._parts, self._parts.progress
        found = None
        if guard.action is GuardAction.REWIND:
            found = parts.savers.newest(parts.state())
        logger.warning(
            "`%s`, epoch %d, step %d: %s; %s",
            guard.name,
            progress.epoch,
            progress.step,
            problem,
            "the loop halts" if found is None else f"rewinds to the state of step {found.step}",
        )
        if found is None:
            return False
        progress.handler_state = ReadOnlyDict(found.handler_state)
        progress.first_step = progress.step  # no guard rewinds a replay
        saved, place = found.loan, parts.blocks.place
        program, accumulators = parts.blocks.program, None
        if program is not None and found.epoch == progress.epoch and found.place in IN_EPOCH:
            accumulators = program.metrics.packing.restored(
                jax.tree.leaves(saved.accumulators), by_dtype=packs_by_dtype(found)
            )
        if accumulators is not None:
            parts.carry.set(*place.commit(own((saved.step_state, accumulators))))
            progress.set_metrics(found.lazy_metrics, parts.blocks.metric_names)
        else:
            parts.carry.set(place.commit(own(saved.step_state)), parts.carry.values[1])
            parts.blocks.reset_metrics()
        return True

    def explain(self, error: BaseException) -> None:
        """Adds to an error a note of where it happened and, as ``loop_state``, the last good state.

        The queued observers run, and stores with ``on_exception`` save the state. After SIGTERM,
        all stores save it.
        """
        parts = self._parts
        error.add_note(f"jaxloop: {parts.activity}")
        state = parts.state() if self._is_alive() else None
        keep_state(error, state)
        if state is None:
            error.add_note(self._say_what_is_left())
        if not isinstance(error, Exception):
            return  # a second Ctrl-C ends the run at once
        last: list[Callable[[], None]] = [parts.observers.flush, parts.observers.sync]
        if state is not None and not isinstance(error, CheckpointError):
            if parts.interrupts.flag.terminates:
                last += [lambda: parts.savers.save(state, ending=True), parts.savers.begin]
            else:
                last += [lambda: parts.savers.save_after_error(state), parts.savers.begin]
        for act in last:
            _note_failure(error, act)

    def explain_start(self, error: BaseException) -> None:
        """Does the same for an error before the first event. Nothing new has to be saved."""
        activity = self._parts.activity
        if not isinstance(error, (JaxloopError, *ENDED_BY_SIGNAL)):
            error.add_note(f"jaxloop: {activity}")
        keep_state(error, activity.first_state() if self._is_alive() else None)

    def _say_what_is_left(self) -> str:
        """Returns a note that the carried arrays are lost, and where the newest checkpoint is."""
        newest = self._parts.savers.newest_name()
        advice = (
            "the loop has no checkpoint"
            if newest is None
            else f"the newest checkpoint is {newest}; loop.resume(path) continues from it"
        )
        return (
            "jaxloop: loop_state is None, because the device failed in a block that had already "
            f"taken over the arrays of the step state; {advice}"
        )

    def _is_alive(self) -> bool:
        """Returns whether the carried arrays are usable: not donated, and without an error."""
        try:
            jax.block_until_ready(self._parts.carry.values)
        except Exception:  # a device error is the one that is being explained
            return False
        return True

    def close(self, error: BaseException | None) -> None:
        """Closes observers and stores.

        Args:
            error: The error that ends the run, or None.
        """
        parts = self._parts
        if error is not None:
            self._close_savers(error)
            _note_failure(error, functools.partial(parts.observers.fail, error))
            _note_failure(error, parts.observers.close)
            parts.clock.end()
            return
        try:
            try:
                # Before the observers, so that nothing that they do can lose a save.
                self._close_savers(None)
            except BaseException as failed:
                _note_failure(failed, functools.partial(parts.observers.fail, failed))
                _note_failure(failed, parts.observers.close)
                raise
            parts.observers.close()
        except BaseException as failed:
            keep_state(failed, parts.state())
            raise
        finally:
            parts.clock.end()

    def _close_savers(self, error: BaseException | None) -> None:
        """Waits for the last save."""
        savers, clock = self._parts.savers, self._parts.clock
        names = [one.name for one, _ in savers.open_stores]
        began = now()
        try:
            savers.close(error)
        finally:
            if names:
                clock.add("saves_s", names[0], now() - began)


def keep_state(error: BaseException, state: State | None) -> None:
    """Sets the ``loop_state`` of an error that leaves a run.

    An error that comes out of a run inside this one gets the state of this one.
    """
    with contextlib.suppress(AttributeError):
        error.loop_state = state  # type: ignore[attr-defined]  # it is added here


def _note_failure(error: BaseException, act: Callable[[], None]) -> None:
    """Calls ``act``. If that fails, a note is added to ``error``, which stays visible."""
    try:
        act()
    except (Exception, *ENDED_BY_SIGNAL) as failed:
        error.add_note(f"jaxloop: another error followed: {type(failed).__name__}: {failed}")
