"""`plot`: the curves of one run, or of several for comparison.

    figure = plot(state)
    figure = plot({"adam": first, "sgd": second}, metrics=["loss"], log_scale=True)

There is one panel for each metric. The values of a validation are in the panel of the metric that
they belong to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxloop._core.state import Snapshot
from jaxloop._core.types import Better
from jaxloop._plotting.figures import (
    GREY,
    add_legend,
    as_text,
    in_lines,
    line,
    new_figure,
    star,
    tidy,
)
from jaxloop._plotting.runs import (
    Run,
    RunsLike,
    Series,
    as_runs,
    better_by_name,
    scalar_names,
    series_of,
)
from jaxloop.errors import ArgumentError, ArgumentTypeError, unknown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BEST, _GAPS = "best epoch", "not finite"
_EVENT_STYLES: tuple[Any, ...] = ("dotted", (0, (6, 3)), "dashdot")
_LARGE_DROP = 0.5
"""A learning rate that falls to this part of the one before was lowered, not scheduled."""
_MOST_DROPS = 10


def plot(
    runs: RunsLike,
    *,
    metrics: Sequence[str] | None = None,
    log_scale: bool | Collection[str] = False,
    better: Mapping[str, Better] | None = None,
    prefixes: Sequence[str] = ("validation_",),
    title: str | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Draws the metrics of a run by epoch, or those of several runs for comparison.

    Each metric has a panel, in which its training values are solid and its validation values
    dashed. A star marks the best epoch: of the validation if there is one, otherwise of the
    training. Vertical lines mark where the run was resumed, halted or interrupted, and where a
    metric "learning_rate" fell by half or more. Crosses at the bottom mark values that are NaN or
    infinite. Metrics that are not one number have no panel.

    Args:
        runs: A `State`, a `Snapshot` or a history ``{epoch: {name: value}}``. For a comparison, a
            list of these, or a dict ``{label: run}``.
        metrics: The metrics to draw, without the prefix, in this order. All by default.
        log_scale: Whether the values are on a logarithmic scale, or the names of the metrics for
            which they are. A metric with a value of 0 or less stays on a linear scale.
        better: ``{metric: "min" or "max"}``, for metrics whose name does not say which values are
            better. Without it, such a metric has no best epoch.
        prefixes: The prefixes of validations.
        title: The title of the figure.
        figure: A figure of matplotlib to draw into, which is cleared. By default, a new one is
            made. pyplot does not know it, so a notebook shows it once; in a script, save it with
            ``savefig``, or pass ``figure=plt.figure()`` to see it in a window.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ArgumentError: A run has no finished epoch, or there is no metric to draw.
        ArgumentTypeError: An argument has the wrong type.
        UnknownNameError: No run has a metric of a name in ``metrics``.

    Example:
        >>> figure = plot({0: {"loss": 0.9, "validation_loss": 1.0}, 1: {"loss": 0.5}})
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['loss']
    """
    found = as_runs(runs, "plot")
    panels = _panels(found, metrics, tuple(prefixes))
    for name in [*(better or {}), *(() if isinstance(log_scale, bool) else log_scale)]:
        if name not in (known := {panel.name for panel in panels}):
            raise unknown_name("metric", name, known)
    figure, all_axes = new_figure(len(panels), figure)
    legend: dict[str, Any] = {}
    for axes, panel in zip(all_axes, panels, strict=True):
        direction = (better or {}).get(panel.name) or better_by_name(panel.name)
        _draw_panel(axes, panel, found, direction, legend)
        wants_log = log_scale if isinstance(log_scale, bool) else panel.name in log_scale
        if wants_log and panel.is_positive():
            axes.set_yscale("log")
    if len(found) > 1:
        legend |= _kinds(panels)
    for label in legend.keys() & {_BEST, _GAPS}:
        legend[label] = legend.pop(label)  # after the lines
    if len(found) == 1:
        _mark_events(all_axes, found[0], legend)
    if len(legend) > 1:
        add_legend(figure, legend)
    if title is not None:
        figure.suptitle(title)
    return figure


@dataclasses.dataclass(frozen=True)
class _Panel:
    """One metric.

    Attributes:
        name: Its name without a prefix.
        series: For each run, its series by prefix. "" is the training.
    """

    name: str
    series: list[dict[str, Series]]

    def is_positive(self) -> bool:
        values = [one.values for by_prefix in self.series for one in by_prefix.values()]
        every = np.concatenate(values)
        finite = every[np.isfinite(every)]
        return bool(len(finite) and np.all(finite > 0))


def _panels(
    runs: Sequence[Run], metrics: Sequence[str] | None, prefixes: tuple[str, ...]
) -> list[_Panel]:
    if isinstance(metrics, str):
        raise ArgumentTypeError(
            f"plot: metrics must be a list of names, got {metrics!r}", fix=f"pass [{metrics!r}]"
        )
    present = scalar_names(runs)
    bases = dict.fromkeys(_base_of(name, prefixes)[1] for name in present)
    if not bases:
        raise ArgumentError(
            "plot: a run must have a metric that is one number, got none",
            fix="attach one, as in loop.metric('accuracy')",
        )
    for name in metrics or ():
        if name not in bases:
            raise unknown_name("metric", name, bases)
    panels = []
    for base in bases if metrics is None else dict.fromkeys(metrics):
        names = {prefix: prefix + base for prefix in ("", *prefixes) if prefix + base in present}
        series = [{p: series_of(run.history, name) for p, name in names.items()} for run in runs]
        panels.append(_Panel(base, series))
    return panels


def _base_of(name: str, prefixes: tuple[str, ...]) -> tuple[str, str]:
    """Returns the prefix of a name, or "", and the rest."""
    prefix = next((one for one in prefixes if name.startswith(one) and name != one), "")
    return prefix, name.removeprefix(prefix)


def _kind(prefix: str) -> str:
    return prefix.rstrip("_") or "training"


# --- one panel -----------------------------------------------------------------------------------


def _draw_panel(
    axes: Axes,
    panel: _Panel,
    runs: Sequence[Run],
    direction: Better | None,
    legend: dict[str, Any],
) -> None:
    # Imported here, because matplotlib is an extra.
    from matplotlib.ticker import MaxNLocator

    epochs: set[int] = set()
    for i, (run, by_prefix) in enumerate(zip(runs, panel.series, strict=True)):
        for dash, (prefix, series) in enumerate(by_prefix.items()):
            kind = _kind(prefix)
            index = i if len(runs) > 1 else dash if "" in by_prefix else 1
            style = line(index, len(series.epochs), dash if "" in by_prefix else 1)
            label = ", ".join(filter(None, (run.label, kind)))
            (drawn,) = axes.plot(series.epochs, series.values, label=label, **style)
            legend.setdefault(kind if len(runs) == 1 else run.label, drawn)
            _draw_gaps(axes, series, style, legend)
            epochs.update(series.epochs.tolist())
        watched = list(by_prefix.values())[-1]
        best = watched.best(direction) if direction is not None else None
        if best is not None:
            epoch, value = best
            marked = axes.plot(epoch, value, label=_BEST, **star())[0]
            if len(runs) > 1:
                marked.set_markerfacecolor(line(i, 1)["color"])
            legend.setdefault(_BEST, marked)
            if len(runs) == 1:
                axes.set_title(
                    f"best {as_text(value)} at epoch {epoch}", loc="left", fontsize="medium"
                )
    values = [one.values for by_prefix in panel.series for one in by_prefix.values()]
    if not np.any(np.isfinite(np.concatenate(values))):
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([])
    axes.set(xlabel="epoch (from 0)", ylabel=in_lines(panel.name))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(epochs) == 1:
        axes.set_xlim(min(epochs) - 0.5, min(epochs) + 0.5)
    tidy(axes)


def _kinds(panels: Sequence[_Panel]) -> dict[str, Any]:
    """Returns what tells training and validation apart if the colours stand for runs."""
    # Imported here, because matplotlib is an extra.
    from matplotlib.lines import Line2D

    kinds: dict[str, int] = {}
    for panel in panels:
        for by_prefix in panel.series:
            for dash, prefix in enumerate(by_prefix):
                kinds.setdefault(_kind(prefix), dash if "" in by_prefix else 1)
    if len(kinds) == 1:
        return {}
    styles = {kind: line(0, 0, dash)["linestyle"] for kind, dash in kinds.items()}
    return {kind: Line2D([], [], color=GREY, linestyle=style) for kind, style in styles.items()}


def _draw_gaps(
    axes: Axes, series: Series, style: Mapping[str, Any], legend: dict[str, Any]
) -> None:
    """Draws the values between two gaps, which no line reaches, and marks the gaps."""
    finite = np.isfinite(series.values)
    if np.all(finite):
        return
    padded = np.concatenate([[False], finite, [False]])
    alone = finite & ~padded[:-2] & ~padded[2:]
    if np.any(alone):
        axes.plot(
            series.epochs[alone],
            series.values[alone],
            linestyle="none",
            marker=style["marker"],
            markersize=style["markersize"],
            color=style["color"],
        )
    missing = axes.plot(
        series.epochs[~finite],
        np.zeros(np.sum(~finite)),
        linestyle="none",
        marker="x",
        markersize=6,
        color=style["color"],
        transform=axes.get_xaxis_transform(),
        clip_on=False,
    )[0]
    legend.setdefault(_GAPS, missing)


# --- events --------------------------------------------------------------------------------------


def _mark_events(all_axes: Sequence[Axes], run: Run, legend: dict[str, Any]) -> None:
    events = [*_lowered_rates(run)]
    if run.state is not None:
        events += [*_resumed(run.state), *_ended(run.state)]
    styles = dict(zip(dict.fromkeys(label for label, _ in events), _EVENT_STYLES, strict=False))
    for label, at in events:
        for axes in all_axes:
            drawn = axes.axvline(at, color=GREY, linewidth=1.0, linestyle=styles[label], zorder=1)
            legend.setdefault(label, drawn)


def _ended(state: Snapshot) -> list[tuple[str, float]]:
    if state.status not in ("halted", "interrupted"):
        return []
    at = float(max(state.history)) if state.status == "halted" else _epoch_of(state, state.step)
    return [(f"{state.status} by {state.halted_by}", at)]


def _resumed(state: Snapshot) -> list[tuple[str, float]]:
    return [("resumed", _epoch_of(state, one.first_step)) for one in state.sessions[1:]]


def _epoch_of(state: Snapshot, step: int) -> float:
    """Returns where a step is on the axis of epochs, on which an epoch ends at its number."""
    steps_of_epochs = state.step - (0 if state.epoch in state.history else state.iteration)
    per_epoch = max(1.0, steps_of_epochs / max(1, len(state.history)))
    return step / per_epoch - 0.5


def _lowered_rates(run: Run) -> list[tuple[str, float]]:
    rates = series_of(run.history, "learning_rate")
    before, after = rates.values[:-1], rates.values[1:]
    drops = rates.epochs[1:][after <= _LARGE_DROP * before]
    if len(drops) > _MOST_DROPS:
        return []
    return [("learning rate lowered", float(epoch) - 0.5) for epoch in drops]
