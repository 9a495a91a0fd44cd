"""The loop: a frozen value with methods.

    import jaxloop as jl

    loop = jl.loop(step_fn).handle("epoch_completed", show, jl.every(2)).metric("accuracy")
    state = loop.run(data, epochs=3)

Every builder method returns a new `Loop` and changes nothing. Each method is a function of
`jaxloop.handlers` or of the engine, bound here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from jaxloop import handlers
from jaxloop._core.checks import check_callable, name_of
from jaxloop._core.events import Event
from jaxloop._core.state import State
from jaxloop._core.step_result import Emission
from jaxloop._core.types import OutputT, PyTree, S
from jaxloop._engine.dry_run import dry_run
from jaxloop._engine.overfit import overfit
from jaxloop._engine.replay import replay
from jaxloop._engine.results import output, restore
from jaxloop._engine.run import check, final_state, run, stream
from jaxloop._learning_rates import find_learning_rate
from jaxloop._spec import LoopSpec


class Loop(LoopSpec[S, OutputT]):
    """An immutable training loop, made by `jaxloop.loop`, `trainer` and `evaluator`.

    Example:
        >>> import jaxloop as jl
        >>> loop = jl.loop(lambda batch, total: total + batch)
        >>> int(loop.run([1, 2, 3], init_state=0, epochs=2).step_state)
        12
    """

    handle = handlers.handle
    observe = handlers.observe
    progress = handlers.progress
    metric = handlers.metric
    derive = handlers.derive
    log = handlers.log
    write = handlers.write
    validate = handlers.validate
    monitor = handlers.monitor
    early_stop = handlers.early_stop
    reduce_lr_on_plateau = handlers.reduce_lr_on_plateau
    checkpoint = handlers.checkpoint
    nan_guard = handlers.nan_guard
    profile = handlers.profile
    alert = handlers.alert
    from_state = handlers.from_state
    resume = handlers.resume

    run = run
    final_state = final_state
    stream = stream
    check = check
    find_learning_rate = find_learning_rate
    dry_run = dry_run
    overfit = overfit
    output = output
    restore = restore
    replay = replay

    def __repr__(self) -> str:
        lines = [f"Loop({name_of(self.step_fn)}"]
        if self.metrics:
            lines.append(f"  metrics: {', '.join(one.name for one in self.metrics)}")
        for one in self.attachments:
            events = "all" if len(one.events) == len(Event) else ", ".join(one.events)
            lines.append(f"  {one.kind} {one.name} on {events} when {one.filter!r}")
        if self.start is not None:
            lines.append(f"  from {self.start!r}")
        if self.resume_path is not None:
            lines.append(f"  resumes {self.resume_path}")
        return "\n".join(lines) + ")"


InitFn = Callable[[PyTree, PyTree], S | Emission[S]]


@overload
def loop(
    step_fn: Callable[[PyTree, S], Emission[S]], init_fn: InitFn[S] | None = None
) -> Loop[S, State[S]]: ...


@overload
def loop(
    step_fn: Callable[[PyTree, S], S], init_fn: InitFn[S] | None = None
) -> Loop[S, State[S]]: ...


@overload
def loop(
    step_fn: Callable[[PyTree, S], S | Emission[S]],
    init_fn: InitFn[S] | None,
    output_transform: Callable[[State[S]], OutputT],
) -> Loop[S, OutputT]: ...


@overload
def loop(
    step_fn: Callable[[PyTree, S], S | Emission[S]],
    init_fn: InitFn[S] | None = None,
    *,
    output_transform: Callable[[State[S]], OutputT],
) -> Loop[S, OutputT]: ...


def loop(
    step_fn: Callable[..., Any],
    init_fn: Callable[..., Any] | None = None,
    output_transform: Callable[..., Any] | None = None,
) -> Loop[Any, Any]:
    """Makes a loop from any step.

    Args:
        step_fn: ``step_fn(batch, step_state)`` returns the next step state, a pytree of the same
            structure, shapes and dtypes, or ``jl.emit(next_state, name=value)``.
        init_fn: ``init_fn(batch, init_state)`` makes the first step state from a sample batch and
            the ``init_state`` passed to `run`. By default, ``init_state`` is the first step state.
        output_transform: Makes the output of `run` from the final `State`.

    Returns:
        A `Loop`.

    Raises:
        ArgumentTypeError: An argument is not callable.

    Example:
        >>> import jaxloop as jl
        >>> int(jl.loop(lambda batch, total: total + batch).run([1, 2], init_state=0).step_state)
        3
    """
    check_callable("loop", "step_fn", step_fn)
    for name, fn in (("init_fn", init_fn), ("output_transform", output_transform)):
        if fn is not None:
            check_callable("loop", name, fn)
    return Loop(step_fn, init_fn, output_transform)
