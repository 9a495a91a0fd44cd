"""Learning-rate reduction: a monitor that scales the learning rate of any Optax optimizer.

    loop = reduce_lr_on_plateau(loop, "validation_loss", factor=0.5, patience=2)

The scale is a part of the step state, so changing it does not recompile the step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxloop._core.checks import check_count
from jaxloop._core.events import EventLike, Status, StatusLike
from jaxloop._core.filters import FilterLike
from jaxloop._core.state import State
from jaxloop._core.types import Mode, PyTree
from jaxloop._spec import RunStart, SpecT
from jaxloop.errors import ArgumentError
from jaxloop.handlers.monitor import Watcher, watch

_KEYS = ("learning_rate_scale", "learning_rate")
"""The names of leaves that are scaled: those of the first name that exists."""


def reduce_lr_on_plateau(
    loop: SpecT,
    metric: str,
    *,
    factor: float = 0.1,
    mode: Mode = "auto",
    patience: int = 3,
    min_delta: float = 0.0,
    min_scale: float = 0.0,
    cooldown: int = 0,
    event: EventLike = "epoch_completed",
    filter: FilterLike = "always",
    name: str | None = None,
) -> SpecT:
    """Scales the learning rate by ``factor`` when ``metric`` has stopped improving.

    Args:
        loop: The loop.
        metric: The metric to watch.
        factor: The factor of a reduction, between 0 and 1.
        mode: See `monitor`.
        patience: See `monitor`.
        min_delta: See `monitor`.
        min_scale: The lowest scale.
        cooldown: The number of events after a reduction that do not count.
        event: See `handle`.
        filter: See `handle`.
        name: Its key in ``state.handler_state``. The default is derived from the metric's name.

    Returns:
        A new loop with the monitor.

    Raises:
        ArgumentError: An argument is out of range, or the name is taken. Raised by `run`, before
            the first step, if there is no learning rate.
        ArgumentTypeError: An argument has the wrong type.
        MissingMetricError: Raised by `run` if the metric can never exist at its events.
    """
    if not 0 < factor < 1:
        raise ArgumentError(
            f"reduce_lr_on_plateau: factor must be between 0 and 1, got {factor}",
            fix="pass a factor such as 0.1",
        )
    check_count("cooldown", cooldown, at_least=0, where="reduce_lr_on_plateau")

    def reduce(state: State[Any]) -> tuple[StatusLike, State[Any]]:
        step_state = scale_learning_rate(state.step_state, factor, min_scale)
        return Status.CONTINUE, state.replace(step_state=step_state)

    def check(start: RunStart) -> None:
        if not _has_learning_rate(start.step_state):
            raise _no_learning_rate()

    watcher = Watcher(
        f"reduce_lr_on_plateau_{metric}" if name is None else name,
        metric,
        reduce,
        mode,
        patience,
        min_delta,
        cooldown,
    )
    return watch(loop, watcher, event, filter, check=check)


def scale_learning_rate(step_state: PyTree, factor: float, min_scale: float) -> PyTree:
    """Returns the step state with its learning rate scaled by ``factor``.

    The trainer's optimizer carries ``learning_rate_scale``. If you write your own step, wrap the
    optimizer in `optax.inject_hyperparams`. Its ``learning_rate`` is then scaled directly.

    Raises:
        ArgumentError: The step state has neither.
    """
    for key in _KEYS:
        found = 0

        def change(path: Any, leaf: Any, key: str = key) -> Any:
            nonlocal found
            if _last_key(path) != key:
                return leaf
            found += 1
            low = min_scale if key == "learning_rate_scale" else 0.0
            return jnp.maximum(leaf * jnp.asarray(factor, leaf.dtype), jnp.asarray(low, leaf.dtype))

        changed = jax.tree_util.tree_map_with_path(change, step_state)
        if found:
            return changed
    raise _no_learning_rate()


def _last_key(path: Any) -> Any:
    """Returns the name of a leaf in its dict, dataclass or named tuple, or None."""
    last = path[-1] if path else None
    return getattr(last, "name", None) or getattr(last, "key", None)


def _has_learning_rate(step_state: PyTree) -> bool:
    return any(
        _last_key(path) in _KEYS for path, _ in jax.tree_util.tree_leaves_with_path(step_state)
    )


def _no_learning_rate() -> ArgumentError:
    return ArgumentError(
        "reduce_lr_on_plateau found no learning rate in the step state",
        fix="use jl.trainer, or make the optimizer with optax.inject_hyperparams(optax.adam)(...)",
    )
