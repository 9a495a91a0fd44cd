"""Early stopping: a monitor that halts the loop.

    loop = early_stop(loop, "validation_loss", patience=5, restore_best=True)

The monitor keeps its memory in the state, so a resumed run stops where an uninterrupted one would.
"""

from __future__ import annotations

from typing import Any

from jaxloop._core.events import EventLike, Status, StatusLike
from jaxloop._core.filters import FilterLike
from jaxloop._core.state import State
from jaxloop._core.types import Mode
from jaxloop._spec import SpecT
from jaxloop.errors import ArgumentError
from jaxloop.handlers.monitor import Watcher, watch


def early_stop(
    loop: SpecT,
    metric: str,
    *,
    mode: Mode = "auto",
    patience: int = 3,
    min_delta: float = 0.0,
    restore_best: bool = False,
    start_from: int = 0,
    baseline: float | None = None,
    event: EventLike = "epoch_completed",
    filter: FilterLike = "always",
    name: str | None = None,
) -> SpecT:
    """Halts the loop when ``metric`` has not improved for ``patience`` events in a row.

    Args:
        loop: The loop.
        metric: The metric to watch.
        mode: See `monitor`.
        patience: See `monitor`.
        min_delta: See `monitor`.
        restore_best: Whether `run` makes its output from the step state of the best event.
            Checkpoints still save the last one. A run has one output, so a loop has at most one
            `early_stop` with this.
        start_from: The number of epochs at the start in which no event counts. Their values are not
            compared, and none of them is the best.
        baseline: A value that an improvement must improve on, besides the best value so far. So the
            loop halts if the metric is not better than this after ``patience`` events.
        event: See `handle`.
        filter: See `handle`.
        name: Its key in ``state.handler_state``, and its name in ``halted_by``. The default is
            derived from the metric's name.

    Returns:
        A new loop that stops early.

    Raises:
        ArgumentError: An argument is out of range, the name is taken, or another `early_stop` of
            this loop restores its best.
        ArgumentTypeError: An argument has the wrong type.
        MissingMetricError: Raised by `run` if the metric can never exist at its events.

    Example:
        >>> import jaxloop as jl
        >>> step = lambda batch, state: jl.emit(state, x=batch)
        >>> loop = jl.loop(step).metric(lambda x: x, "x", None, ["x"])
        >>> loop = loop.early_stop("x", mode="max", patience=2)
        >>> loop.run([1.0], epochs=9).halted_by
        'early_stop_x'
        >>> loop.run([1.0], epochs=9).epoch
        3
    """
    name = f"early_stop_{metric}" if name is None else name
    watcher = Watcher(
        name,
        metric,
        _halt,
        mode,
        patience,
        min_delta,
        keeps_state=restore_best,
        start_from=start_from,
        baseline=baseline,
    )
    if restore_best and loop.best_from is not None:
        raise ArgumentError(
            f"only one handler can restore its best state, got {loop.best_from} and {name}",
            fix="pass restore_best=True to one of them",
        )
    loop = watch(loop, watcher, event, filter)
    return loop.replace(best_from=name) if restore_best else loop


def _halt(state: State[Any]) -> tuple[StatusLike, State[Any]]:
    return Status.HALT_LOOP, state
