"""Handlers that watch a metric: `monitor`, and early stopping and learning-rate reduction on it.

    loop.early_stop("validation_loss", patience=5).reduce_lr_on_plateau("loss", factor=0.5)

What a monitor remembers lives in ``state.handler_state[name]`` and nowhere else, so that a resumed
run decides as the undisturbed one. The decision itself is `better`, written once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._core.events import Status, as_events
from jaxloop._core.filters import as_filter
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop._loop import Loop
from jaxloop._spec import Attachment, EventLike, FilterLike, Handler
from jaxloop.errors import (
    ArgumentError,
    ArgumentTypeError,
    ShapeError,
    missing_metric,
    unknown_name,
)

Mode = str | Callable[[Any, Any], bool]


def check_mode(where: str, mode: Mode) -> None:
    """Raises unless ``mode`` is "min", "max" or a function of (new, best)."""
    if isinstance(mode, str):
        if mode not in ("min", "max"):
            raise unknown_name(f"mode of {where}", mode, ["min", "max"])
    elif not callable(mode):
        raise ArgumentTypeError(f"{where}: mode must be 'min', 'max' or a function, not {mode!r}")


def read(state: State, who: str, name: str) -> float:
    """The scalar metric ``name``.

    Raises:
        MissingMetricError: It is not there; the error lists those that are.
        ShapeError: It is not a scalar.
    """
    if name not in state.metrics:
        raise missing_metric(who, name, state.metrics)
    value = state.metrics[name]
    if np.ndim(value) != 0:
        raise ShapeError(
            f"{who} needs a scalar, and the metric {name!r} has shape {np.shape(value)}",
            fix="attach a metric whose value is one number",
        )
    return float(value)


def better(new: float, best: float, mode: Mode, min_delta: float) -> bool:
    """Whether ``new`` improves on ``best`` by strictly more than ``min_delta``; NaN never does.

    Example:
        >>> better(0.5, 0.6, "min", 0.0), better(float("nan"), 0.6, "min", 0.0)
        (True, False)
    """
    if np.isnan(new):
        return False
    if np.isnan(best):
        return True  # the first number seeds the best
    if callable(mode):
        return bool(mode(new, best))
    return best - new > min_delta if mode == "min" else new - best > min_delta


@dataclasses.dataclass(frozen=True)
class Watcher:
    """Counts events without improvement, and calls ``handler`` when patience is at its end."""

    name: str
    metric: str
    handler: Handler
    mode: Mode
    patience: int
    min_delta: float
    cooldown: int = 0
    keeps_state: bool = False

    def fresh(self) -> dict[str, Any]:
        """What is remembered before the first event."""
        memory: dict[str, Any] = {"best": np.float64("nan"), "count": 0, "cooldown": 0}
        return {**memory, "step_state": None} if self.keeps_state else memory

    def __call__(self, state: State) -> tuple[Any, State]:
        memory = dict(state.handler_state.get(self.name) or self.fresh())
        value = read(state, f"`{self.name}`", self.metric)
        improved = better(value, float(memory["best"]), self.mode, self.min_delta)
        if improved:
            memory["best"] = np.float64(value)
            if self.keeps_state:
                memory["step_state"] = state.step_state
        cooling = int(memory["cooldown"]) > 0
        memory["cooldown"] = max(0, int(memory["cooldown"]) - 1)
        memory["count"] = 0 if improved or cooling else int(memory["count"]) + 1
        fires = memory["count"] >= self.patience
        if fires:
            memory["count"], memory["cooldown"] = 0, self.cooldown
        state = state.replace(handler_state={**state.handler_state, self.name: memory})
        if not fires:
            return Status.CONTINUE, state
        result = self.handler(state)
        return (Status.CONTINUE, state) if result is None else result


def _attach(loop: Loop, watcher: Watcher, event: EventLike, filter: FilterLike) -> Loop:
    where = watcher.name
    check_mode(where, watcher.mode)
    if not isinstance(watcher.metric, str):
        raise ArgumentTypeError(f"{where}: metric must be a name, and is {watcher.metric!r}")
    if isinstance(watcher.patience, bool) or not isinstance(watcher.patience, int):
        raise ArgumentTypeError(f"{where}: patience must be an int, and is {watcher.patience!r}")
    if watcher.patience < 1:
        raise ArgumentError(f"{where}: patience must be at least 1, and is {watcher.patience}")
    if not watcher.min_delta >= 0:
        raise ArgumentError(f"{where}: min_delta must be at least 0, and is {watcher.min_delta}")
    return loop.attach(
        Attachment(
            as_events(event),
            watcher,
            as_filter(filter),
            watcher.name,
            watches=(watcher.metric,),
            adds=(),
            reserved=True,
        )
    )


def attach_monitor(
    loop: Loop,
    metric: str,
    handler: Handler,
    name: str,
    mode: Mode,
    patience: int,
    min_delta: float,
    event: EventLike,
    filter: FilterLike,
) -> Loop:
    """See `Loop.monitor`."""
    if not callable(handler):
        raise ArgumentTypeError(f"monitor: handler must be a function, and is {handler!r}")
    return _attach(loop, Watcher(name, metric, handler, mode, patience, min_delta), event, filter)


def _halt(state: State) -> tuple[Status, State]:
    return Status.HALT_LOOP, state


def attach_early_stop(
    loop: Loop,
    metric: str,
    mode: Mode,
    patience: int,
    min_delta: float,
    restore_best: bool,
    event: EventLike,
    filter: FilterLike,
    name: str | None,
) -> Loop:
    """See `Loop.early_stop`."""
    name = name or f"early_stop_{metric}"
    watcher = Watcher(name, metric, _halt, mode, patience, min_delta, keeps_state=restore_best)
    loop = _attach(loop, watcher, event, filter)
    return dataclasses.replace(loop, best_of=name) if restore_best else loop


@dataclasses.dataclass(frozen=True)
class _Reduce:
    factor: float
    min_scale: float

    def __call__(self, state: State) -> tuple[Status, State]:
        step_state = scale_learning_rate(state.step_state, self.factor, self.min_scale)
        return Status.CONTINUE, state.replace(step_state=step_state)


def scale_learning_rate(step_state: PyTree, factor: float, min_scale: float) -> PyTree:
    """The step state with its learning rate's scale multiplied by ``factor``.

    The trainer's optimizer carries ``learning_rate_scale``; in a loop of one's own, an optimizer
    under `optax.inject_hyperparams` has ``learning_rate``, which is scaled itself.

    Raises:
        ArgumentError: The step state has neither.
    """
    for key in ("learning_rate_scale", "learning_rate"):
        found = 0

        def change(path: Any, leaf: Any, key: str = key) -> Any:
            nonlocal found
            last = path[-1] if path else None
            if (getattr(last, "name", None) or getattr(last, "key", None)) != key:
                return leaf
            found += 1
            low = min_scale if key == "learning_rate_scale" else 0.0
            return jnp.maximum(leaf * jnp.asarray(factor, leaf.dtype), jnp.asarray(low, leaf.dtype))

        changed = jax.tree_util.tree_map_with_path(change, step_state)
        if found:
            return changed
    raise ArgumentError(
        "reduce_lr_on_plateau found no learning rate in the step state",
        fix="use jl.trainer, or make the optimizer with optax.inject_hyperparams(optax.adam)(...)",
    )


def attach_reduce_lr(
    loop: Loop,
    metric: str,
    factor: float,
    mode: Mode,
    patience: int,
    min_delta: float,
    min_scale: float,
    cooldown: int,
    event: EventLike,
    filter: FilterLike,
    name: str | None,
) -> Loop:
    """See `Loop.reduce_lr_on_plateau`."""
    if not 0 < factor < 1:
        raise ArgumentError(f"reduce_lr_on_plateau: factor must be in (0, 1), and is {factor}")
    if isinstance(cooldown, bool) or not isinstance(cooldown, int) or cooldown < 0:
        raise ArgumentError(
            f"reduce_lr_on_plateau: cooldown must be a whole number from 0, and is {cooldown!r}"
        )
    watcher = Watcher(
        name or f"reduce_lr_on_plateau_{metric}",
        metric,
        _Reduce(factor, min_scale),
        mode,
        patience,
        min_delta,
        cooldown,
    )
    return _attach(loop, watcher, event, filter)
