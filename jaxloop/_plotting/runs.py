"""What a user may pass as a run, and the series of numbers in it.

    runs = as_runs(state)                       # [Run("", history, state)]
    series = series_of(history, "loss")         # epochs and values

Only the history is read, and of a state what tells where it was resumed and halted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxloop._core.checks import as_number
from jaxloop._core.state import Snapshot
from jaxloop._core.types import Better
from jaxloop.errors import ArgumentError, ArgumentTypeError
from jaxloop.metrics.declare import declare, names
from jaxloop.metrics.names import better_of, names_of_value

History: TypeAlias = Mapping[int, Mapping[str, Any]]
"""``{epoch: {name: value}}``."""

RunLike: TypeAlias = Snapshot | History
"""A run: a `State`, a `Snapshot`, or its history."""

RunsLike: TypeAlias = RunLike | Sequence[RunLike] | Mapping[str, RunLike]
"""A run, or several: a list, or a dict with their labels."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run to draw.

    Attributes:
        label: Its label, or "" if it is the only one.
        history: Its metrics by epoch.
        state: What else is known of it, or None.
    """

    label: str
    history: History
    state: Snapshot | None


@dataclasses.dataclass(frozen=True)
class Series:
    """The values of one metric, in the order of the epochs. Values that are not finite are NaN."""

    epochs: np.ndarray[Any, Any]
    values: np.ndarray[Any, Any]

    def best(self, better: Better) -> tuple[int, float] | None:
        """Returns the epoch and the value of the best, the first of equals. None without values."""
        if not np.any(np.isfinite(self.values)):
            return None
        at = int((np.nanargmax if better == "max" else np.nanargmin)(self.values))
        return int(self.epochs[at]), float(self.values[at])


def as_runs(runs: RunsLike, where: str) -> list[Run]:
    """Returns the runs that were passed, with their labels.

    Raises:
        ArgumentTypeError: They are none of what is allowed.
        ArgumentError: There is nothing to draw.
    """
    if isinstance(runs, Mapping) and runs and all(isinstance(key, str) for key in runs):
        found = [_as_run(str(label), run, where) for label, run in runs.items()]
    elif isinstance(runs, Sequence) and not isinstance(runs, str | bytes):
        found = [_as_run(f"run {i}", run, where) for i, run in enumerate(runs)]
    else:
        found = [_as_run("", runs, where)]
    if not any(run.history for run in found):
        raise ArgumentError(
            f"{where}: a run must have at least one finished epoch, got none",
            fix="draw a state after its first epoch, such as that of loop.final_state(...)",
        )
    return found


def _as_run(label: str, run: object, where: str) -> Run:
    if isinstance(run, Snapshot):
        return Run(label, run.history, run)
    if isinstance(run, Mapping) and all(
        isinstance(epoch, int | np.integer) and isinstance(metrics, Mapping)
        for epoch, metrics in run.items()
    ):
        return Run(label, run, None)
    raise ArgumentTypeError(
        f"{where}: a run must be a State, a Snapshot or a history {{epoch: {{name: value}}}}, got "
        f"{type(run).__name__} {run!r:.60}",
        fix="pass loop.final_state(...), state.history, a list of these, or a dict with labels",
    )


def scalar_names(runs: Sequence[Run]) -> list[str]:
    """Returns the names of the metrics that are one number, in the order of their appearance.

    The loss comes first, because a checkpoint does not keep the order.
    """
    found: dict[str, None] = {}
    for run in runs:
        for metrics in run.history.values():
            for name, value in metrics.items():
                if name not in found and as_number(value) is not None:
                    found[name] = None
    return sorted(found, key=lambda name: name != "loss")


def series_of(history: History, name: str) -> Series:
    """Returns a metric of the epochs that have it."""
    epochs, values = [], []
    for epoch in sorted(history):
        if name in history[epoch]:
            value = as_number(history[epoch][name])
            epochs.append(epoch)
            values.append(value if value is not None and math.isfinite(value) else math.nan)
    return Series(np.asarray(epochs, np.int64), np.asarray(values, np.float64))


def better_by_name(metric: str) -> Better | None:
    """Returns which values of a metric are better, as far as its name says.

    Example:
        >>> better_by_name("accuracy/head"), better_by_name("loss"), better_by_name("gradient_norm")
        ('max', 'min', None)
    """
    known = (*names(), "loss")
    return next((better_of(declare(n)) for n in names_of_value(metric) if n in known), None)
