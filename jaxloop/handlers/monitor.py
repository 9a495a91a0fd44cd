"""Monitors: handlers that watch a metric and act when it stops improving.

    loop = monitor(loop, "loss", lower_something, name="lower", patience=5)

A monitor keeps its memory in ``state.handler_state[name]`` and nowhere else, so a resumed run
makes the same decisions as an uninterrupted one. Only `is_better` compares values.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxloop._core.checks import as_number, check_callable, check_count, check_mode
from jaxloop._core.events import EventLike, Status, StatusLike, as_events
from jaxloop._core.filters import FilterLike, as_filter
from jaxloop._core.state import State
from jaxloop._core.types import Mode
from jaxloop._spec import Handler, HandlerFn, RunStart, SpecT
from jaxloop.errors import (
    ArgumentError,
    ArgumentTypeError,
    ShapeError,
    StructureError,
    missing_metric,
)


def monitor(
    loop: SpecT,
    metric: str,
    handler: HandlerFn,
    *,
    name: str,
    mode: Mode = "auto",
    patience: int = 3,
    min_delta: float = 0.0,
    event: EventLike = "epoch_completed",
    filter: FilterLike = "always",
) -> SpecT:
    """Calls ``handler`` at the ``patience``-th event in a row without an improvement.

    A metric that `validate` adds exists from then on to the end of the epoch. An event at which the
    metric has no value, because `validate` has not run in this epoch, does not count. If it can
    never have one, `run` raises before the first step.

    Args:
        loop: The loop.
        metric: The metric to watch.
        handler: See `handle`. After the call, counting starts again and the best value stays.
        name: Its key in ``state.handler_state``.
        mode: Which values are better: "min" (the smaller ones), "max", or as a function
            ``(new, best) -> bool`` decides. "auto" means what the metric says: more is better for
            an accuracy, less for a loss. If that is unknown, as for a function, "auto" means "min",
            and `run` warns once, before the first step.
        patience: The number of events in a row without an improvement, at least 1.
        min_delta: An improvement must be better by strictly more than this.
        event: See `handle`.
        filter: See `handle`.

    Returns:
        A new loop with the monitor.

    Raises:
        ArgumentError: An argument is out of range, or the name is taken.
        ArgumentTypeError: An argument has the wrong type.
        MissingMetricError: Raised by `run` if the metric can never exist at its events.
    """
    check_callable("monitor", "handler", handler)
    watcher = Watcher(name, metric, handler, mode, patience, min_delta)
    return watch(loop, watcher, event, filter, adds=None)


def read_scalar(state: State[Any], who: str, name: str) -> float:
    """Returns the scalar metric ``name``.

    Raises:
        MissingMetricError: The metric does not exist. The error lists the ones that do.
        ShapeError: The metric is not a scalar.
    """
    if name not in state.metrics:
        raise missing_metric(who, name, state.metrics)
    value = state.metrics[name]
    number = as_number(value)
    if number is None:
        raise _not_scalar(who, name, value)
    return number


def _not_scalar(who: str, name: str, value: object) -> ShapeError:
    got = f"of shape {value.shape}" if hasattr(value, "shape") else f"a {type(value).__name__}"
    return ShapeError(
        f"{who} needs a scalar metric, got {name!r}, {got}",
        fix="attach a metric whose value is one number",
    )


def is_better(new: float, best: float, mode: Mode, min_delta: float) -> bool:
    """Returns whether ``new`` improves on ``best`` by strictly more than ``min_delta``.

    NaN is never an improvement, and the first number always is. The mode "auto" means "min" here,
    because two values do not tell.

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
    return new - best > min_delta if mode == "max" else best - new > min_delta


def resolved(mode: Mode, metric: str, start: RunStart) -> Mode:
    """Returns the mode that "auto" means for a metric, and any other mode as it is."""
    return start.better_of(metric) or "min" if mode == "auto" else mode


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
        start_from: The first epoch in which an event counts.
        baseline: A value that an improvement must also improve on, or None.
    """

    name: str
    metric: str
    handler: HandlerFn
    mode: Mode
    patience: int
    min_delta: float
    cooldown: int = 0
    keeps_state: bool = False
    start_from: int = 0
    baseline: float | None = None

    def fresh(self) -> dict[str, Any]:
        """Returns its memory before the first event."""
        memory: dict[str, Any] = {"best": np.float64("nan"), "count": 0, "cooldown": 0}
        return {**memory, "step_state": None} if self.keeps_state else memory

    def recall(self, state: State[Any]) -> dict[str, Any]:
        """Returns its memory, of this run or an earlier one.

        Raises:
            StructureError: Something else is stored under its name.
        """
        memory, found = self.fresh(), state.handler_state.get(self.name) or {}
        try:
            found = dict(found)
            for key in ("best", "count", "cooldown"):
                float(found.get(key, 0))
        except (TypeError, ValueError, OverflowError) as error:
            raise StructureError(
                f"handler_state[{self.name!r}] must be the memory of a monitor, got "
                f"{state.handler_state[self.name]!r:.80}",
                fix="give the monitor another name=, because its name is the key of its memory",
            ) from error
        if self.keeps_state and found and "step_state" not in found:
            warnings.warn(
                f"{self.name}: the earlier run did not keep its best step state, because it had no "
                "restore_best=True, so the best value starts anew",
                stacklevel=2,
            )
            del found["best"]
        # A memory without restore_best does not hold on to the step state of an earlier run.
        return {key: found.get(key, memory[key]) for key in memory}

    def open(self, start: RunStart) -> HandlerFn:
        """Checks, before the first step, that the metric is a scalar. See `Handler`.

        Returns:
            The watcher of this run, whose mode is known.
        """
        value = start.metrics.get(self.metric, 0.0)
        if getattr(value, "shape", ()) or not jax.tree_util.all_leaves([value]):
            raise _not_scalar(f"`{self.name}`", self.metric, value)
        return dataclasses.replace(self, mode=resolved(self.mode, self.metric, start))

    def _improves(self, value: float, on: float) -> bool:
        return is_better(value, on, self.mode, self.min_delta)

    def __call__(self, state: State[Any]) -> tuple[StatusLike, State[Any]]:
        if state.epoch < self.start_from:
            return Status.CONTINUE, state
        memory = self.recall(state)
        value = read_scalar(state, f"`{self.name}`", self.metric)
        improved = self._improves(value, float(memory["best"]))
        if improved:
            memory["best"] = np.float64(value)
            if self.keeps_state:
                memory["step_state"] = state.step_state
            # The best value may be below the baseline. It is remembered, but the event counts.
            improved = self.baseline is None or self._improves(value, self.baseline)
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


def _check_baseline(where: str, baseline: object) -> None:
    number = 0.0 if baseline is None else as_number(baseline)
    if number is None:
        raise ArgumentTypeError(
            f"{where}: baseline must be a number or None, got {baseline!r}",
            fix="pass the value that the metric must improve on, such as 0.9",
        )
    if np.isnan(number):
        raise ArgumentError(
            f"{where}: baseline must be a number, got nan",
            fix="pass the value that the metric must improve on, or None",
        )


def watch(
    loop: SpecT,
    watcher: Watcher,
    event: EventLike,
    filter: FilterLike,
    *,
    adds: tuple[str, ...] | None = (),
    check: Callable[[RunStart], None] | None = None,
) -> SpecT:
    """Attaches a watcher, after checking its arguments.

    Args:
        loop: The loop.
        watcher: The watcher.
        event: See `handle`.
        filter: See `handle`.
        adds: See `Handler`.
        check: Called before the first step. It raises if it finds a mistake.

    Raises:
        ArgumentError: An argument is out of range.
        ArgumentTypeError: An argument has the wrong type.
    """
    where = watcher.name
    if not isinstance(where, str) or not where:
        raise ArgumentTypeError(
            f"monitor: name must be a nonempty string, got {where!r}",
            fix="pass a name such as 'early_stop', which is the key of its memory",
        )
    check_mode(where, watcher.mode)
    if not isinstance(watcher.metric, str):
        raise ArgumentTypeError(
            f"{where}: metric must be the name of a metric, got {watcher.metric!r}",
            fix="pass the name of an attached metric, such as 'loss'",
        )
    check_count("patience", watcher.patience, at_least=1, where=where)
    check_count("start_from", watcher.start_from, at_least=0, where=where)
    _check_baseline(where, watcher.baseline)
    min_delta = as_number(watcher.min_delta)
    if min_delta is None:
        raise ArgumentTypeError(
            f"{where}: min_delta must be a number, got {watcher.min_delta!r}",
            fix="pass 0 or a positive number",
        )
    if not min_delta >= 0:
        raise ArgumentError(
            f"{where}: min_delta must be at least 0, got {watcher.min_delta}",
            fix="pass 0 or a positive number",
        )

    def open(start: RunStart) -> HandlerFn:
        if check is not None:
            check(start)
        return watcher.open(start)

    return loop.attach(
        Handler(
            as_events(event),
            as_filter(filter),
            watcher.name,
            watcher,
            watches=(watcher.metric,),
            adds=adds,
            open=open,
            unique=True,
            auto_mode=watcher.mode == "auto",
        )
    )
