"""Functions that attach your own functions to a loop and set where it starts.

    loop = handle(loop, "epoch_completed", show, every(2))
    loop = observe(loop, "iteration_completed", lambda snapshot: print(snapshot.step))
    loop = metric(loop, "accuracy")
    loop = derive(loop, "error", lambda accuracy: 1 - accuracy, of="accuracy")
    loop = resume(loop, "runs/a")

Each function takes a loop and returns a new one of the same kind.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from jaxloop._checkpoint.names import check_path
from jaxloop._core.checks import check_callable, name_of
from jaxloop._core.events import EventLike, as_events
from jaxloop._core.filters import FilterLike, as_filter
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop._spec import Handler, HandlerFn, Observer, ObserverFn, SpecT
from jaxloop.errors import ArgumentTypeError
from jaxloop.metrics.declare import (
    AccumulateLike,
    FieldsLike,
    MetricLike,
    MetricSpec,
    Per,
    WhereLike,
    declare,
    of_training_loss,
)
from jaxloop.metrics.derived import declare_derived


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
        filter: Selects the firings: "always", "once", ``jl.every(n)``, a dict, or a function
            ``state -> bool``. A function is called at every firing, so blocks are not fused.
        name: Its name in errors and in ``halted_by``. Defaults to the function's name.

    Returns:
        A new loop with the handler.

    Raises:
        UnknownNameError: The event or the filter is unknown.
        ArgumentTypeError: ``handler`` is not callable.

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
    """Runs ``observer(snapshot)`` when ``event`` fires.

    An observer changes nothing, so blocks stay fused.

    Args:
        loop: The loop.
        event: See `handle`.
        observer: Gets a `Snapshot`. Its result is ignored. If it has a ``close`` method, the run
            calls it once when it ends, with or without an error.
        filter: See `handle`. A function gets the snapshot.
        name: Its name in errors. Defaults to the function's name.

    Returns:
        A new loop with the observer.

    Raises:
        UnknownNameError: The event or the filter is unknown.
        ArgumentTypeError: ``observer`` is not callable.

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
    *,
    per: Per = None,
    where: WhereLike = None,
) -> SpecT:
    """Accumulates a metric over each epoch, exactly, on the device.

    If a model has several outputs, a metric by name is evaluated for each leaf of the prediction,
    paired with the leaves of the target in order, as in a loss. Each value has the name of the
    metric and the path of the leaf, such as ``accuracy/head`` or ``accuracy/0``. Other metrics get
    targets and predictions as they are.

    Weights (the output ``sample_weight``, or a mask from ``where``) have the shape ``(batch,)`` or
    any leading part of the target's shape, such as ``(batch, time)``. Each element of the weights
    then counts as one example, and a metric gets its arguments with these axes as one.

    Sums, counts, minima and maxima of integers are exact integers, ``np.int64`` in
    ``state.metrics`` if they do not keep their own dtype. Means of integers are ``np.float64``,
    rounded once.

    Args:
        loop: The loop.
        metric: The name of a built-in metric, a `Metric`, a function of the extracted values, or a
            class with the CLU protocol. Any other name, and the name of a built-in metric whose
            fields the step does not report, is that of a value that the step reports or carries.
            The value is averaged like the result of a function.
        name: Its key in ``state.metrics``.
        accumulate: None for the metric's own accumulator, or "running_average", "running_sum",
            "running_min", "running_max", "last", ``jl.window(n)`` for the mean over the last ``n``
            iterations, or ``(acc, obs, i) -> acc``.
        transform_or_fields: Names of values that the step reports or, failing that, carries in its
            state. Or a function of both, merged into one dict, that returns the list of arguments.
        per: What the result of a function, or a reported value, stands for. "example" means
            ``(batch, *rest)``, which is weighted by example. "batch" means one value of any shape
            for the whole batch, which counts for all its examples, or for the sum of their weights.
            By default, an array whose first axis has the length of the batch has one value per
            example, also if that is by chance. A scalar is one for the batch, and an error if the
            batch has weights or a mask.
        where: Selects the examples that count: the name of a boolean mask ``(batch,)``, or a
            function of what ``transform_or_fields`` gets that returns one, such as
            ``lambda named: named["y_true"] >= 0``. The others get weight 0. A mask with more axes
            than the weights selects elements.

    Returns:
        A new loop with the metric.

    Raises:
        UnknownNameError: The accumulator is unknown. Raised by `run`, before the first step, if the
            name of the metric is neither that of a built-in nor of a value.
        ArgumentTypeError: An argument has the wrong type.
        ArgumentError: ``per`` is not "example" or "batch", or the metric decides this itself.

    Example:
        >>> import jaxloop as jl
        >>> step = lambda batch, state: jl.emit(state, x=batch)
        >>> loop = jl.loop(step).metric("x").metric(lambda x: x**2, "squares", None, ["x"])
        >>> values = loop.run([1.0, 2.0, 3.0]).history[0]
        >>> float(values["x"]), round(float(values["squares"]), 2)
        (2.0, 4.67)
    """
    declared = declare(metric, name, accumulate, transform_or_fields, per=per, where=where)
    if loop.task is not None and loop.task.loss is not None:
        declared = of_training_loss(declared)
    return _with_metric(loop, declared)


def derive(loop: SpecT, name: str, fn: Callable[..., PyTree], of: str | Sequence[str]) -> SpecT:
    """Computes a metric from the values of others when they are read.

    It exists wherever the others do: in ``state.metrics``, the history and the log, for monitors
    and checkpoints, and with its prefix in a validation. It may be derived from derived metrics.
    Nothing is accumulated for it or compiled into the step.

    Args:
        loop: The loop.
        name: Its key in ``state.metrics``.
        fn: Returns the value, a number or a pytree of numbers and arrays. It gets the values of
            ``of`` as NumPy values, in that order. Before the first update, these are NaN, or 0 for
            integers. `run` calls it with these once before the first step, to find mistakes. A
            function of NumPy is faster than one of JAX, which runs on the device.
        of: The name of a metric of the loop, or a tuple of names. A metric of several outputs has a
            value for each, such as ``accuracy/head``.

    Returns:
        A new loop with the metric.

    Raises:
        ArgumentTypeError: An argument has the wrong type.
        UnknownNameError: Raised by `run`, before the first step, if the loop has no metric of a
            name in ``of``.

    Example:
        >>> import jaxloop as jl
        >>> import numpy as np
        >>> loop = jl.loop(lambda batch, state: jl.emit(state, x=batch)).metric("x")
        >>> loop = loop.derive("root", np.sqrt, of="x")
        >>> float(loop.run([3.0, 5.0]).history[0]["root"])
        2.0
    """
    return _with_metric(loop, declare_derived(name, fn, of))


def _with_metric(loop: SpecT, declared: MetricSpec) -> SpecT:
    kept = tuple(one for one in loop.metrics if one.name != declared.name)
    if len(kept) != len(loop.metrics):
        warnings.warn(
            f"metric {declared.name!r} was declared twice; the last declaration wins",
            stacklevel=3,
        )
    return loop.replace(metrics=(*kept, declared))


def from_state(loop: SpecT, state: State[Any]) -> SpecT:
    """Starts from ``state``, which may be halted, instead of calling the init function.

    The run is a new one: it keeps the checkpoints that the run of ``state`` has written.

    Returns:
        A new loop that starts from ``state``.

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
            fix="pass a State, or pass a bare step state to run as init_state",
        )
    return loop.replace(start=state)


def resume(loop: SpecT, path: str | os.PathLike[str] = "checkpoint") -> SpecT:
    """Resumes from the newest good checkpoint in ``path``, or starts fresh if there is none.

    A damaged checkpoint is skipped with a warning.

    Returns:
        A new loop that resumes.

    Raises:
        ArgumentTypeError: ``path`` is not a path.
        ArgumentError: ``path`` is empty or an address such as "gs://bucket".
        CheckpointError: Raised by `run` if the path is not a folder, or cannot be read.
        SerializationError: Raised by `run` if the newest good checkpoint does not fit the loop.
    """
    return loop.replace(resume_path=check_path("resume", path))
