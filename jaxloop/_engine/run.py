"""Running a loop: `run`, `final_state`, `stream` and `check`, which `Loop` has as methods.

    output = run(spec, data, init_state, epochs=3)
    state = final_state(spec, data, init_state, epochs=3)
    for state in stream(spec, data, epochs=3): ...
    print(check(spec, data))

Each makes one run from its parts, and uses it once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack, overload

from jaxloop._core.checks import check_callable
from jaxloop._core.interrupts import ENDED_BY_SIGNAL
from jaxloop._core.state import State
from jaxloop._core.types import DataLike, OutputT, ResultT, S
from jaxloop._engine.firing import Firing
from jaxloop._engine.options import RunArguments, RunOptions, takes_run_arguments
from jaxloop._engine.parts import Parts
from jaxloop._engine.recovery import Recovery, keep_state
from jaxloop._engine.results import make_output, shown
from jaxloop._engine.start import begin, run_start
from jaxloop._engine.walk import MAX_TIME, flush, walk
from jaxloop._spec import LoopSpec

if TYPE_CHECKING:
    from jaxloop._engine.report import Report

logger = logging.getLogger("jaxloop")

Transform: TypeAlias = Callable[[State[S]], ResultT]
"""Makes an output from a state."""


@overload
def run(
    loop: LoopSpec[S, OutputT],
    data: DataLike,
    init_state: Any = None,
    *,
    output_transform: None = None,
    **arguments: Unpack[RunArguments],
) -> OutputT: ...


@overload
def run(
    loop: LoopSpec[S, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    output_transform: Transform[S, ResultT],
    **arguments: Unpack[RunArguments],
) -> ResultT: ...


@takes_run_arguments
def run(
    loop: LoopSpec[S, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    output_transform: Transform[S, Any] | None = None,
    **arguments: Unpack[RunArguments],
) -> Any:
    """Runs the loop to its end.

    Args:
        loop: The loop.
        data: Batches: an iterable, a function ``epoch -> iterable``, a one-shot iterator, or
            None together with ``iterations`` or ``steps``.
        init_state: The argument of the init function or, without one, the first step state.
        epochs: The total number of epochs, including those before a resume. Defaults to 1 or, with
            ``steps``, to as many as these take.
        iterations: The maximum number of iterations in an epoch.
        steps: The total number of steps, including those before a resume. An epoch in which they
            are reached is completed there, and a run that is continued begins the next epoch. An
            endless iterator is one epoch.
        max_time: The seconds after which this call ends, counted from when it was made. The run
            then ends between two iterations as after Ctrl-C: with its state saved, the status
            "interrupted", and ``halted_by`` "max_time". The same script resumes it. Each call runs
            at least one iteration. None sets no limit.
        jit: False runs op by op, after a trace of the step that checks its shapes. A dict passes
            options to `jax.jit`.
        fuse: The maximum number of iterations in a compiled block. 1 never fuses, and "auto"
            decides from the step and the platform.
        strict: Whether a recompilation during the run is an error.
        debug: Whether to log events, handlers and times with `logging`.
        output_transform: Makes the output from the final `State`. It overrides the loop's own.

    Returns:
        The result of the output transform, or the final `State` if there is none.

    After Ctrl-C, the run saves its state and returns it with the status "interrupted". A run inside
    another run raises instead, and the outer run then ends in the same way.

    Raises:
        JaxloopError: A check before the first step, or the run itself, found a mistake.
        Terminated: SIGTERM arrived. The state is saved, and the script ends unless you catch this.

    Example:
        >>> import jaxloop as jl
        >>> jl.loop(lambda b, s: s + b).run([1.5, 2.5], init_state=0.0).step_state.item()
        4.0
        >>> state = jl.loop(lambda b, s: s + b).run([1, 2, 3], init_state=0, steps=5)
        >>> state.epoch, state.step, int(state.step_state)
        (2, 5, 9)
    """
    _check_transform(output_transform)
    current = Run(loop, data, init_state, RunOptions.of(arguments))
    return make_output(loop, current.finish(), output_transform)


@takes_run_arguments
def final_state(
    loop: LoopSpec[S, Any],
    data: DataLike,
    init_state: Any = None,
    **arguments: Unpack[RunArguments],
) -> State[S]:
    """Runs the loop to its end, and returns the final `State` in place of the output.

    The arguments are those of `run`. ``loop.output(state)`` makes the output from it.

    Returns:
        The final state, with ``history``, ``times`` and the last ``step_state``.

    Raises:
        JaxloopError: See `run`.
        Terminated: See `run`.

    Example:
        >>> import jaxloop as jl
        >>> loop = jl.loop(lambda b, s: s + b, output_transform=lambda state: int(state.step_state))
        >>> state = loop.final_state([1, 2], init_state=0, epochs=2)
        >>> state.epoch, loop.output(state)
        (2, 6)
    """
    return shown(loop, Run(loop, data, init_state, RunOptions.of(arguments)).finish())


@overload
def stream(
    loop: LoopSpec[S, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    output_transform: None = None,
    **arguments: Unpack[RunArguments],
) -> Iterator[State[S]]: ...


@overload
def stream(
    loop: LoopSpec[S, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    output_transform: Transform[S, ResultT],
    **arguments: Unpack[RunArguments],
) -> Iterator[ResultT]: ...


@takes_run_arguments
def stream(
    loop: LoopSpec[S, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    output_transform: Transform[S, Any] | None = None,
    **arguments: Unpack[RunArguments],
) -> Iterator[Any]:
    """Runs the loop one epoch at a time.

    The arguments are those of `run`. If you pass ``output_transform``, it is applied to each state.
    While your code runs between two states, signals do what they do outside a run.

    Returns:
        An iterator with one `State` per epoch. After Ctrl-C, its last state has the status
        "interrupted".

    Raises:
        Terminated: See `run`. The iterator raises it.

    Example:
        >>> import jaxloop as jl
        >>> stream = jl.loop(lambda b, s: s + b).stream([1, 2], init_state=0, epochs=2)
        >>> [int(state.step_state) for state in stream]
        [3, 6]
    """
    _check_transform(output_transform)
    states: Iterator[Any] = Run(loop, data, init_state, RunOptions.of(arguments)).states(give=True)
    if loop.show is not None:
        states = map(functools.partial(shown, loop), states)
    return states if output_transform is None else map(output_transform, states)


@takes_run_arguments
def check(
    loop: LoopSpec[S, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    output_transform: Transform[S, Any] | None = None,
    **arguments: Unpack[RunArguments],
) -> Report:
    """Makes every check that is possible before the first step, and returns a report to print.

    The arguments are those of `run`. The first batch of the data is read.

    Returns:
        A report that prints as a table.

    Raises:
        JaxloopError: A check found a mistake.

    Example:
        >>> import jaxloop as jl
        >>> report = jl.loop(lambda b, s: s + b).check([1.0], init_state=0.0)
        >>> report.num_leaves
        1
    """
    # Imported here, because a run needs no report.
    from jaxloop._engine.report import report

    _check_transform(output_transform)
    parts = Run(loop, data, init_state, RunOptions.of(arguments)).parts
    try:
        return report(parts, output_transform or loop.output_transform)
    except BaseException as error:
        keep_state(error, parts.state())
        raise


def _check_transform(output_transform: object) -> None:
    if output_transform is not None:
        check_callable("run", "output_transform", output_transform)


class Run:
    """One run of a loop. It is used once.

    Attributes:
        parts: The parts of the run, from its start on.
    """

    def __init__(
        self, spec: LoopSpec, data: DataLike, init_state: Any, options: RunOptions
    ) -> None:
        self.parts = Parts.of(spec, data, options)
        self._recovery = Recovery(self.parts)
        self._ended = self._begin(init_state)

    def _begin(self, init_state: Any) -> State | None:
        parts = self.parts
        try:
            # Nothing is lost if a signal ends this at any point, so it raises at once.
            with parts.interrupts, parts.interrupts.waiting:
                ended = begin(parts, init_state)
                parts.interrupts.poll()  # an exception that a signal raises may get lost in JAX
        except BaseException as error:
            self._recovery.explain_start(error)
            if isinstance(error, ENDED_BY_SIGNAL):
                self._raise_after_signal(parts.activity.first_state())
            raise
        parts.activity.begin()
        return ended

    def finish(self) -> State:
        """Runs to the end, and returns the final state."""
        for _ in self.states(give=False):
            pass
        return self.parts.state() if self._ended is None else self._ended

    def states(self, *, give: bool) -> Iterator[State]:
        """Runs to the end. If ``give``, yields a `State` after each epoch."""
        parts = self.parts
        if self._ended is not None or parts.options.bounds.is_empty:
            return
        try:
            with parts.interrupts, parts.prefetcher:
                yield from self._walk(give)
        except Exception as error:
            if not parts.interrupts.flag.terminates or parts.interrupts.nested:
                raise
            # An error that SIGTERM caused, such as the death of a data worker, ends the script too.
            logger.exception("after SIGTERM, another error ended the run")
            self._raise_after_signal(getattr(error, "loop_state", None), error)
        ended_by_signal = self._end_by_signal()
        if give and (ended_by_signal or parts.progress.halted_by == MAX_TIME):
            yield parts.state()

    def _walk(self, give: bool) -> Iterator[State]:
        parts, recovery = self.parts, self._recovery
        firing = Firing(parts, recovery)
        try:
            parts.savers.open()
            if parts.observers.openable:
                parts.observers.open(run_start(parts, parts.blocks.sample))
            parts.clock.start()
            yield from walk(parts, firing, give=give)
            flush(parts)
            parts.blocks.settle(0)
            parts.prefetcher.keep_buffers()
        except GeneratorExit:
            recovery.close(None)
            raise
        except BaseException as error:
            recovery.explain(error)
            recovery.close(error)
            raise
        recovery.close(None)

    def _end_by_signal(self) -> bool:
        """Reports a signal to the caller when everything is closed: no signal is lost.

        Returns:
            Whether a signal arrived, which the status of the state reports.
        """
        parts, progress = self.parts, self.parts.progress
        name = parts.interrupts.flag.name
        if name is None:
            return False
        if parts.interrupts.nested and progress.status != "interrupted":
            return False  # this run is complete, and the outer run ends next
        self._raise_after_signal(parts.state())
        # The signal may have arrived after the last poll, and what is saved is complete.
        progress.status, progress.halted_by = "interrupted", name
        return True

    def _raise_after_signal(self, state: State | None, cause: Exception | None = None) -> None:
        error = self.parts.interrupts.error(state)
        if error is not None:
            keep_state(error, state)
            raise error from cause
