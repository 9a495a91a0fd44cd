"""Attaching functions of your own, and saying where a loop starts.

    loop = handle(loop, "epoch_completed", show, every(2))
    loop = observe(loop, "iteration_completed", lambda snapshot: print(snapshot.step))
    loop = metric(loop, "accuracy")
    loop = resume(loop, "runs/a")

Each function takes a loop and returns a new one of the same kind.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from jaxloop._core.checks import check_callable, name_of
from jaxloop._core.events import EventLike, as_events
from jaxloop._core.filters import FilterLike, as_filter
from jaxloop._core.state import State
from jaxloop._spec import Handler, HandlerFn, Observer, ObserverFn, SpecT
from jaxloop.errors import ArgumentError, ArgumentTypeError
from jaxloop.metrics.declare import AccumulateLike, FieldsLike, MetricLike, declare


def handle(
    loop: SpecT,
    event: EventLike,
    handler: HandlerFn,
    filter: FilterLike = "always",
    *,
    name: str | None = None,
) -> SpecT:
    """Runs ``handler(state)`` when ``event`` fires.

    Args:
        loop: The loop.
        event: An event, its name, a list of them, or "all".
        handler: Gets the `State`, and returns None or ``(status, state)``.
        filter: At which firings: "always", "once", ``jl.every(n)``, a dict, or a function
            ``state -> bool``. A function is called at every firing, so blocks are not fused.
        name: What errors and ``halted_by`` call it; by default the function's name.

    Raises:
        UnknownNameError: The event or the filter is unknown.
        ArgumentTypeError: ``handler`` cannot be called.

    Example:
        >>> import jaxloop as jl
        >>> stop = lambda state: ("halt_loop", state)
        >>> loop = jl.loop(lambda b, s: s + b).handle("iteration_completed", stop, jl.only(2))
        >>> loop.run([1, 1, 1], init_state=0).step
        2
    """
    check_callable("handle", "handler", handler)
    return loop.attach(
        Handler(as_events(event), as_filter(filter), name or name_of(handler), handler)
    )


def observe(
    loop: SpecT,
    event: EventLike,
    observer: ObserverFn,
    filter: FilterLike = "always",
    *,
    name: str | None = None,
) -> SpecT:
    """Runs ``observer(snapshot)`` when ``event`` fires. It only looks, so blocks stay fused.

    Args:
        loop: The loop.
        event: As for `handle`.
        observer: Gets a `Snapshot`. What it returns is ignored. If it has a ``close`` method, that
            is called once when the run ends, however it ends.
        filter: As for `handle`; a function gets the snapshot.
        name: What errors call it.

    Example:
        >>> import jaxloop as jl
        >>> seen = []
        >>> loop = jl.loop(lambda b, s: s + b).observe("all", lambda s: seen.append(s.step))
        >>> _ = loop.run([1, 1], init_state=0)
        >>> seen
        [0, 0, 0, 1, 1, 2, 2, 2]
    """
    check_callable("observe", "observer", observer)
    close = getattr(observer, "close", None)
    return loop.attach(
        Observer(
            as_events(event),
            as_filter(filter),
            name or name_of(observer),
            observer,
            close=close if callable(close) else None,
        )
    )


def metric(
    loop: SpecT,
    metric: MetricLike,
    name: str | None = None,
    accumulate: AccumulateLike = None,
    transform_or_fields: FieldsLike = ("y_true", "y_pred"),
) -> SpecT:
    """Accumulates a metric over each epoch, exactly, on the device.

    Args:
        loop: The loop.
        metric: A built-in's name, a `Metric`, a function of the extracted values, or a class
            with the CLU protocol.
        name: Its key in ``state.metrics``.
        accumulate: None for the metric's own, or "running_average", "running_sum",
            "running_min", "running_max", "last", or ``(acc, obs, i) -> acc``.
        transform_or_fields: Names looked up in what the step reports, then in its state; or a
            function of both merged that returns the list of arguments.

    Raises:
        UnknownNameError: The metric or the accumulator is unknown.

    Example:
        >>> import jaxloop as jl
        >>> step = lambda batch, state: jl.emit(state, x=batch)
        >>> loop = jl.loop(step).metric(lambda x: x, "mean", None, ["x"])
        >>> float(loop.run([1.0, 2.0, 3.0]).history[0]["mean"])
        2.0
    """
    declared = declare(metric, name, accumulate, transform_or_fields)
    kept = tuple(one for one in loop.metrics if one.name != declared.name)
    if len(kept) != len(loop.metrics):
        warnings.warn(
            f"metric {declared.name!r} was declared twice; the last declaration wins",
            stacklevel=2,
        )
    return loop.replace(metrics=(*kept, declared))


def from_state(loop: SpecT, state: State[Any]) -> SpecT:
    """Starts from ``state``, also from a halted one. It wins over the init function.

    Raises:
        ArgumentTypeError: ``state`` is not a `State`.

    Example:
        >>> import jaxloop as jl
        >>> loop = jl.loop(lambda b, s: s + b)
        >>> first = loop.run([1, 2], init_state=0)
        >>> int(loop.from_state(first).run([1, 2], epochs=2).step_state)
        6
    """
    if not isinstance(state, State):
        raise ArgumentTypeError(
            f"from_state: state must be a jl.State, got {type(state).__name__}",
            fix="to start from a step state alone, pass it to run as init_state",
        )
    return loop.replace(start=state)


def resume(loop: SpecT, path: str | os.PathLike[str] = "checkpoint") -> SpecT:
    """Resumes from the newest good checkpoint in ``path``, or starts fresh if there is none.

    Raises:
        ArgumentTypeError: ``path`` is not a path.
        ArgumentError: ``path`` is empty.
    """
    return loop.replace(resume_path=check_path("resume", path))


def check_path(where: str, path: object) -> str:
    """Returns the path of a folder as a string.

    Raises:
        ArgumentTypeError: ``path`` is not a path.
        ArgumentError: ``path`` is empty.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ArgumentTypeError(
            f"{where}: path must be a string or a pathlib.Path, got {path!r}",
            fix=f"pass a folder, or leave {where} out",
        )
    folder = str(os.fspath(path))
    if not folder:
        raise ArgumentError(f"{where}: path must not be empty", fix="pass a folder")
    return folder
