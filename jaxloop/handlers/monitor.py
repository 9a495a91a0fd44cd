"""Monitors: handlers that watch a metric and act when it stops improving.

    loop = monitor(loop, "loss", lower_something, name="lower", patience=5)

A monitor keeps its memory in ``state.handler_state[name]`` and nowhere else, so a resumed run
makes the same decisions as an uninterrupted one. Only `is_better` compares values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxloop._core.checks import check_callable, check_count, check_mode
from jaxloop._core.events import EventLike, Status, StatusLike, as_events
from jaxloop._core.filters import FilterLike, as_filter
from jaxloop._core.state import State
from jaxloop._core.types import Mode
from jaxloop._spec import Handler, HandlerFn, SpecT
from jaxloop.errors import ArgumentError, ArgumentTypeError, ShapeError, missing_metric


def monitor(
    loop: SpecT,
    metric: str,
    handler: HandlerFn,
    *,
    name: str,
    mode: Mode = "min",
    patience: int = 3,
    min_delta: float = 0.0,
    event: EventLike = "epoch_completed",
    filter: FilterLike = "always",
) -> SpecT:
    """Calls ``handler`` at the ``patience``-th event in a row without an improvement.

    Args:
        loop: The loop.
        metric: The metric to watch.
        handler: See `handle`. After the call, counting starts again and the best value stays.
        name: Its key in ``state.handler_state``.
        mode: "min", "max", or a function ``(new, best) -> bool``.
        patience: The number of events in a row without an improvement, at least 1.
        min_delta: An improvement must be better by strictly more than this.
        event: See `handle`.
        filter: See `handle`.

    Returns:
        A new loop with the monitor.

    Raises:
        ArgumentError: An argument is out of range.
        ArgumentTypeError: An argument has the wrong type.
    """
    check_callable("monitor", "handler", handler)
    watcher = Watcher(name, metric, handler, mode, patience, min_delta)
    return watch(loop, watcher, event, filter)


def read_scalar(state: State[Any], who: str, name: str) -> float:
    """Returns the scalar metric ``name``.

    Raises:
        MissingMetricError: The metric does not exist. The error lists the ones that do.
        ShapeError: The metric is not a scalar.
    """
    if name not in state.metrics:
        raise missing_metric(who, name, state.metrics)
    value = state.metrics[name]
    if np.ndim(value) != 0:
        raise ShapeError(
            f"{who} needs a scalar metric, got {name!r} of shape {np.shape(value)}",
            fix="attach a metric whose value is one number",
        )
    return float(value)


def is_better(new: float, best: float, mode: Mode, min_delta: float) -> bool:
    """Returns whether ``new`` improves on ``best`` by strictly more than ``min_delta``.

    NaN is never an improvement, and the first number always is.

    Example:
        >>> is_better(0.5, 0.6, "min", 0.0), is_better(float("nan"), 0.6, "min", 0.0)
        (True, False)
    """
    if np.isnan(new):
        return False
    if np.isnan(best):
        return True
    if callable(mode):
        return bool(mode(new, best))
    return best - new > min_delta if mode == "min" else new - best > min_delta


@dataclasses.dataclass(frozen=True)
class Watcher:
    """A counter of events without an improvement, which calls ``handler`` at ``patience``.

    Attributes:
        name: The key of its memory.
        metric: The metric to watch.
        handler: The function to call.
        mode: Which values are better.
        patience: The number of events in a row.
        min_delta: How much better an improvement must be.
        cooldown: The number of events after a call that do not count.
        keeps_state: Whether its memory includes the step state of the best event.
    """

    name: str
    metric: str
    handler: HandlerFn
    mode: Mode
    patience: int
    min_delta: float
    cooldown: int = 0
    keeps_state: bool = False

    def fresh(self) -> dict[str, Any]:
        """Returns its memory before the first event."""
        memory: dict[str, Any] = {"best": np.float64("nan"), "count": 0, "cooldown": 0}
        return {**memory, "step_state": None} if self.keeps_state else memory

    def __call__(self, state: State[Any]) -> tuple[StatusLike, State[Any]]:
        memory = dict(state.handler_state.get(self.name) or self.fresh())
        value = read_scalar(state, f"`{self.name}`", self.metric)
        improved = is_better(value, float(memory["best"]), self.mode, self.min_delta)
        if improved:
            memory["best"] = np.float64(value)
            if self.keeps_state:
                memory["step_state"] = state.step_state
        cooling = int(memory["cooldown"]) > 0
        memory["cooldown"] = max(0, int(memory["cooldown"]) - 1)
        memory["count"] = 0 if improved or cooling else int(memory["count"]) + 1
        impatient = memory["count"] >= self.patience
        if impatient:
            memory["count"], memory["cooldown"] = 0, self.cooldown
        state = state.replace(handler_state={**state.handler_state, self.name: memory})
        if not impatient:
            return Status.CONTINUE, state
        result = self.handler(state)
        return (Status.CONTINUE, state) if result is None else result


def watch(loop: SpecT, watcher: Watcher, event: EventLike, filter: FilterLike) -> SpecT:
    """Attaches a watcher, after checking its arguments.

    Raises:
        ArgumentError: An argument is out of range.
        ArgumentTypeError: An argument has the wrong type.
    """
    where = watcher.name
    check_mode(where, watcher.mode)
    if not isinstance(watcher.metric, str):
        raise ArgumentTypeError(
            f"{where}: metric must be the name of a metric, got {watcher.metric!r}",
            fix="pass the name of an attached metric, such as 'loss'",
        )
    check_count("patience", watcher.patience, at_least=1, where=where)
    if not watcher.min_delta >= 0:
        raise ArgumentError(
            f"{where}: min_delta must be at least 0, got {watcher.min_delta}",
            fix="pass 0 or a positive number",
        )
    return loop.attach(
        Handler(
            as_events(event),
            as_filter(filter),
            watcher.name,
            watcher,
            watches=(watcher.metric,),
            adds=(),
            unique=True,
        )
    )
