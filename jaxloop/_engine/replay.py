"""Replay: a run continues from a checkpoint, up to one of its steps, with the same bits.

    state, batch = replay(loop, "runs/a", 1234, data=data)

It is the run of `jaxloop._engine.run`, with two changes: whatever writes or only looks is removed
from the loop, and a last handler on ``iteration_started`` ends the run when its step is next.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Unpack

from jaxloop._core.arrays import put
from jaxloop._core.checks import check_count
from jaxloop._core.events import Event, Place
from jaxloop._core.filters import before
from jaxloop._core.state import State
from jaxloop._core.types import DataLike, PyTree, S
from jaxloop._data.source import NO_BATCH, sample_of
from jaxloop._engine.first_state import step_state_like
from jaxloop._engine.options import RunArguments, RunOptions, takes_run_arguments
from jaxloop._engine.parts import Parts
from jaxloop._engine.run import Run
from jaxloop._spec import Attachment, CheckpointTrigger, Guard, Handler, LoopSpec, Observer, Store
from jaxloop.errors import ArgumentError

_BOUNDS = ("epochs", "iterations", "steps")


@takes_run_arguments
def replay(
    loop: LoopSpec[S, Any],
    path: str | os.PathLike[str],
    step: int,
    *,
    data: DataLike,
    init_state: Any = None,
    **arguments: Unpack[RunArguments],
) -> tuple[State[S], PyTree]:
    """Returns the state and the batch as they were right before the iteration that ended a step.

    The newest checkpoint before that iteration is restored, or the run starts again if there is
    none, and the loop runs up to it. The numbers are the same, bit for bit. Handlers run, because
    they may change the state, and those of ``started`` run as in a run that is resumed. Observers,
    logs, guards and saves do not, and nothing in the folder changes. To look at the iteration, call
    ``loop.step_fn(batch, state.step_state)``, for example under `jax.disable_jit` or with
    ``jax_debug_nans``.

    The run is the one that wrote the newest checkpoint in the folder. If it was killed, or if
    `nan_guard` halted it, it also ran steps after that checkpoint, which can be replayed too. The
    folder of a run that ended before its first checkpoint is empty. If
    ``nan_guard("rewind")`` rewound the run, replaying a step after that needs a checkpoint that was
    saved in between.

    Args:
        loop: The loop that ran.
        path: The path that was passed to `checkpoint`.
        step: The value of ``state.step`` after the iteration, from 1. The state that is returned
            has ``state.step == step - 1``.
        data: The data that were passed to `run`.
        init_state: The ``init_state`` that was passed to `run`.
        **arguments: The other arguments that were passed to `run`. If you pass none of ``epochs``,
            ``iterations`` and ``steps``, those that the newest checkpoint knows are used.

    Returns:
        ``(state, batch)``: the `State` after the handlers of ``iteration_started``, and the batch
        that the step gets next, as arrays on the device.

    Raises:
        ArgumentError: The run has no such step. The error says which it has.
        CheckpointError: The folder does not exist, or it cannot be read.
        SerializationError: The checkpoint belongs to another model or optimizer.
        KeyboardInterrupt: Ctrl-C arrived.

    Example:
        >>> import tempfile, jaxloop as jl
        >>> path = tempfile.mkdtemp()
        >>> loop = jl.loop(lambda batch, total: total + batch).checkpoint(path)
        >>> _ = loop.run([1, 2, 3], init_state=0, epochs=2)
        >>> state, batch = loop.replay(path, 5, data=[1, 2, 3], init_state=0)
        >>> state.step, int(state.step_state), int(batch)
        (4, 7, 2)
    """
    # Imported here, because most loops never read a checkpoint.
    from jaxloop._checkpoint.saved_run import saved_run

    check_count("step", step, at_least=1, where="replay")
    run = saved_run(path, step, 0 if loop.start is None else loop.start.step)
    first = run.first_step + 1
    if step < first or (run.last_step is not None and step > run.last_step):
        raise _no_such_step(step, first, run.newest_step, run.last_step is not None, run.folder)
    given: RunArguments = {**arguments}
    if not any(name in given for name in _BOUNDS):
        epochs, iterations, steps = run.bounds
        given = {**given, "epochs": epochs, "iterations": iterations, "steps": steps}
    options = RunOptions.of(given)
    like = None
    if loop.init_fn is not None or init_state is not None:
        sample = NO_BATCH if loop.init_fn is None else sample_of(data)
        like = step_state_like(loop, sample, init_state, jit=options.jit is not None)
    start = run.load_before(step, like)
    if start is None:
        start = _beginning(loop, first)
    found = _Target(step)
    spec = _quiet(loop, found.handler(start)).replace(start=start, resume_path=None)
    current = Run(spec, data, init_state, options)
    if not found.is_next(current.parts):
        final = _finish(current)
        if found.state is None:
            raise _no_such_step(step, first, final.step, True, run.folder)
    state = current.parts.state() if found.state is None else found.state
    return state, put(current.parts.prefetcher.peek())


def _finish(current: Run) -> State:
    """Runs up to the target, or to the end of the run."""
    try:
        final = current.finish()
    except _Reached:
        return current.parts.state()
    if final.status == "interrupted":
        raise KeyboardInterrupt
    return final


class _Reached(BaseException):
    """The next iteration is the one that was asked for. No event fires after this."""


class _Target:
    """The handler that ends the run before its iteration.

    Attributes:
        state: The state right before the iteration, once the run is there.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self.state: State[Any] | None = None

    def __call__(self, state: State[Any]) -> None:
        if state.step == self._step - 1:
            self.state = state
            raise _Reached

    def is_next(self, parts: Parts) -> bool:
        """Returns whether the iteration has started before the state was saved."""
        return parts.progress.place is Place.STEP and parts.progress.step == self._step - 1

    def handler(self, start: State[Any] | None) -> Handler:
        """Returns the handler for a run that starts from a state."""
        begun = 0 if start is None else start.event_counts[Event.ITERATION_STARTED][0]
        done = 0 if start is None else start.step
        # More iterations have started than this if handlers halted some of them. It is asked at
        # each start from the earliest on, so that blocks before that keep their length.
        earliest = max(1, begun + self._step - 1 - done)
        return Handler((Event.ITERATION_STARTED,), ~before(earliest), "replay", self, adds=())


def _quiet(loop: LoopSpec, last: Handler) -> LoopSpec:
    """Returns the loop without what writes or only looks, and with a last handler."""
    kept: list[Attachment] = []
    for one in loop.attachments:
        if isinstance(one, CheckpointTrigger):
            # Its turn still comes, because it remembers the best value in the state.
            one = dataclasses.replace(one, open_store=_open_nowhere, check=None, check_state=None)
        if not isinstance(one, Observer | Guard):
            kept.append(one)
    return loop.replace(attachments=(*kept, last))


class _Nowhere:
    """A `Store` that saves nothing."""

    on_exception = False

    def save(self, state: State[Any], value: float | None) -> None:
        """Does nothing."""

    def begin(self) -> None:
        """Does nothing."""

    def poll(self) -> None:
        """Does nothing."""

    def newest(self, state: State[Any]) -> None:
        """Returns None."""

    def newest_name(self) -> None:
        """Returns None."""

    def newest_complete(self) -> None:
        """Returns None."""

    def close(self) -> None:
        """Does nothing."""


def _open_nowhere(opened: Sequence[Store]) -> Store:
    del opened
    return _Nowhere()


def _beginning(loop: LoopSpec, first: int) -> State[Any] | None:
    """Returns the state that the run started from, or None if it made its own first state.

    Raises:
        ArgumentError: The run cannot be repeated from its beginning, and the loop does not start
            from the state that is needed.
    """
    start = loop.start
    step = 0 if start is None else start.step
    if step != first - 1:
        raise ArgumentError(
            f"replay: the run started from a state of step {first - 1}, or got other bounds or was "
            "rewound there, and has no checkpoint before the step to replay, so the loop must "
            f"start from that state, got {'none' if start is None else f'a state of step {step}'}",
            fix="pass that state to loop.from_state, or replay a later step",
        )
    return start


def _no_such_step(step: int, first: int, last: int, ended: bool, folder: object) -> ArgumentError:
    more = "" if ended else " and the steps after its newest checkpoint"
    return ArgumentError(
        f"replay: step must be one of the run in {folder}, got {step}; the steps that can be "
        f"replayed are {first} to {last}{more}",
        fix="pass one of these",
    )
