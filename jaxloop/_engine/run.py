"""Running a loop: `run`, `stream` and `check`, which `Loop` has as methods.

    output = run(spec, data, init_state, epochs=3)
    for state in stream(spec, data, epochs=3): ...
    print(check(spec, data))

Each makes one run from its parts, and uses it once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from jaxloop._core.checks import check_callable
from jaxloop._core.state import State
from jaxloop._core.types import DataLike, Fuse, JitOptions, OutputT, ResultT, S
from jaxloop._engine.firing import Firing
from jaxloop._engine.options import RunOptions
from jaxloop._engine.parts import Parts
from jaxloop._engine.recovery import Recovery
from jaxloop._engine.start import begin
from jaxloop._engine.walk import walk
from jaxloop._spec import LoopSpec

if TYPE_CHECKING:
    from jaxloop._engine.report import Report

Transform: TypeAlias = Callable[[State[S]], ResultT]
"""Makes an output from a state."""


@overload
def run(
    loop: LoopSpec[S, OutputT],
    data: DataLike,
    init_state: Any = None,
    *,
    epochs: int = 1,
    iterations: int | None = None,
    jit: JitOptions = True,
    fuse: Fuse = "auto",
    strict: bool = False,
    debug: bool = False,
    output_transform: None = None,
) -> OutputT: ...


@overload
def run(
    loop: LoopSpec[S, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    epochs: int = 1,
    iterations: int | None = None,
    jit: JitOptions = True,
    fuse: Fuse = "auto",
    strict: bool = False,
    debug: bool = False,
    output_transform: Transform[S, ResultT],
) -> ResultT: ...


def run(
    loop: LoopSpec[S, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    epochs: int = 1,
    iterations: int | None = None,
    jit: JitOptions = True,
    fuse: Fuse = "auto",
    strict: bool = False,
    debug: bool = False,
    output_transform: Transform[S, Any] | None = None,
) -> Any:
    """Runs the loop to its end.

    Args:
        loop: The loop.
        data: Batches: an iterable, a function ``epoch -> iterable``, a one-shot iterator, or
            None together with ``iterations``.
        init_state: The argument of the init function or, without one, the first step state.
        epochs: The total number of epochs, including those before a resume.
        iterations: The maximum number of iterations in an epoch.
        jit: False runs op by op. A dict passes options to `jax.jit`.
        fuse: The maximum number of iterations in a compiled block. 1 never fuses, and "auto"
            decides from the step and the platform.
        strict: Whether a recompilation during the run is an error.
        debug: Whether to log events, handlers and times with `logging`.
        output_transform: Makes the output from the final `State`. It overrides the loop's own.

    Returns:
        The result of the output transform, or the final `State` if there is none.

    Raises:
        JaxloopError: A check before the first step, or the run itself, found a mistake.

    Example:
        >>> import jaxloop as jl
        >>> jl.loop(lambda b, s: s + b).run([1.5, 2.5], init_state=0.0).step_state.item()
        4.0
    """
    options = RunOptions.of(epochs, iterations, jit, fuse, strict, debug)
    current = _Run(loop, data, init_state, options, output_transform)
    for _ in current.states(give=False):
        pass
    return current.output()


@overload
def stream(
    loop: LoopSpec[S, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    epochs: int = 1,
    iterations: int | None = None,
    jit: JitOptions = True,
    fuse: Fuse = "auto",
    strict: bool = False,
    debug: bool = False,
    output_transform: None = None,
) -> Iterator[State[S]]: ...


@overload
def stream(
    loop: LoopSpec[S, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    epochs: int = 1,
    iterations: int | None = None,
    jit: JitOptions = True,
    fuse: Fuse = "auto",
    strict: bool = False,
    debug: bool = False,
    output_transform: Transform[S, ResultT],
) -> Iterator[ResultT]: ...


def stream(
    loop: LoopSpec[S, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    epochs: int = 1,
    iterations: int | None = None,
    jit: JitOptions = True,
    fuse: Fuse = "auto",
    strict: bool = False,
    debug: bool = False,
    output_transform: Transform[S, Any] | None = None,
) -> Iterator[Any]:
    """Runs the loop one epoch at a time.

    The arguments are those of `run`. If you pass ``output_transform``, it is applied to each state.

    Returns:
        An iterator with one `State` per epoch.

    Example:
        >>> import jaxloop as jl
        >>> stream = jl.loop(lambda b, s: s + b).stream([1, 2], init_state=0, epochs=2)
        >>> [int(state.step_state) for state in stream]
        [3, 6]
    """
    options = RunOptions.of(epochs, iterations, jit, fuse, strict, debug)
    states = _Run(loop, data, init_state, options, output_transform).states(give=True)
    return states if output_transform is None else map(output_transform, states)


def check(
    loop: LoopSpec[S, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    epochs: int = 1,
    iterations: int | None = None,
    jit: JitOptions = True,
    fuse: Fuse = "auto",
    strict: bool = False,
    debug: bool = False,
    output_transform: Transform[S, Any] | None = None,
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

    options = RunOptions.of(epochs, iterations, jit, fuse, strict, debug)
    current = _Run(loop, data, init_state, options, output_transform)
    return report(current.parts, current.output_transform)


class _Run:
    """One run of a loop. It is used once."""

    def __init__(
        self,
        spec: LoopSpec,
        data: DataLike,
        init_state: Any,
        options: RunOptions,
        output_transform: Callable[[State], Any] | None,
    ) -> None:
        if output_transform is not None:
            check_callable("run", "output_transform", output_transform)
        self.output_transform = output_transform or spec.output_transform
        self.parts = Parts.of(spec, data, options)
        self._ended = begin(self.parts, init_state)

    def states(self, *, give: bool) -> Iterator[State]:
        """Runs to the end. If ``give``, yields a `State` after each epoch."""
        parts = self.parts
        if self._ended is not None or parts.options.epochs == 0:
            return
        recovery = Recovery(parts)
        firing = Firing(parts, recovery)
        with parts.interrupts, parts.prefetcher:
            try:
                parts.savers.open()
                yield from walk(parts, firing, give=give)
                parts.observers.flush()
                parts.blocks.settle(0)
            except GeneratorExit:
                recovery.close(None)
                raise
            except BaseException as error:
                recovery.explain(error)
                recovery.close(error)
                raise
            recovery.close(None)

    def output(self) -> Any:
        """Returns the output of the run."""
        state = self._ended if self._ended is not None else self.parts.state()
        name = self.parts.spec.best_from
        best = None if name is None else state.handler_state.get(name)
        if best is not None and "step_state" not in best:
            warnings.warn(
                f"{name}: the run that ended did not keep its best step state, because it had no "
                "restore_best=True, so the output is made from the last one",
                stacklevel=3,
            )
        elif best is not None and best["step_state"] is not None:
            state = state.replace(step_state=best["step_state"])
        return state if self.output_transform is None else self.output_transform(state)
