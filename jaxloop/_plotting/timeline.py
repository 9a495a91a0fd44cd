"""`plot_timeline`: where the time of a run went.

    figure = plot_timeline(state)

The left panel shows each epoch, the right one each session, that is each call that has worked on
the run. Handlers of "epoch_completed", such as a validation, run between two epochs, so that only
the sessions contain their time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxloop._core.sessions import Session
from jaxloop._core.state import Snapshot
from jaxloop._core.times import EpochTime
from jaxloop._plotting.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    add_legend,
    new_figure,
    tidy,
    unit_of,
)
from jaxloop.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PARTS: dict[str, tuple[str, str]] = {
    "device": (BLUE, ""),
    "data": (ORANGE, "//"),
    "compile": (PURPLE, ".."),
    "dispatch": (SKY, "\\\\"),
    "validation": (GREEN, "xx"),
    "handlers": (VERMILION, "--"),
    "saves": ("#F0E442", "oo"),
    "start": ("#DDDDDD", "++"),
    "lost": (GREY, "**"),
}
"""The parts of the time, from the bottom up, each with its colour and its hatch."""
_MOST_BARS = 40
"""With more epochs, the bars touch each other and have no outline."""
_SMALLEST_SHARE = 0.0005


def plot_timeline(
    state: Snapshot, *, title: str | None = None, figure: Figure | None = None
) -> Figure:
    """Draws how the seconds of a run were spent, for each epoch and for each session.

    The parts are those of an `EpochTime` and of a `Session`: the device worked ("device"), or the
    run waited for data, compiled the step, dispatched blocks, validated, called other handlers and
    observers, or waited for checkpoints ("saves"). A session also has its time before the first
    step ("start"), and the time whose work was lost because the process was killed ("lost"). The
    legend says how large each part is of all sessions.

    Args:
        state: The `State` or `Snapshot` of a run that has finished an epoch.
        title: The title of the figure. By default, it says how much of the time made progress.
        figure: See `plot`.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ArgumentTypeError: ``state`` is neither a `State` nor a `Snapshot`.
        ArgumentError: No epoch of the run has ended.

    Example:
        >>> import jaxloop as jl
        >>> state = jl.loop(lambda batch, total: total + batch).run([1, 2], init_state=0, epochs=3)
        >>> figure = plot_timeline(state)
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['each epoch, to its last step', 'each session']
    """
    if not isinstance(state, Snapshot):
        raise ArgumentTypeError(
            f"plot_timeline: state must be a State or a Snapshot, got {type(state).__name__}",
            fix="pass loop.final_state(...)",
        )
    if not state.times:
        raise ArgumentError(
            "plot_timeline: at least one epoch of the run must have ended, got none",
            fix="draw a state after its first epoch, such as that of loop.final_state(...)",
        )
    epochs = [_of_epoch(EpochTime.of(state.times[epoch])) for epoch in sorted(state.times)]
    sessions = [_of_session(one) for one in state.sessions]
    figure, axes = new_figure(2 if sessions else 1, figure)
    whole = sessions or epochs
    totals = {part: sum(one[part] for one in whole) for part in _PARTS}
    total = sum(totals.values()) or 1.0
    shown = [part for part in _PARTS if totals[part] >= _SMALLEST_SHARE * total]
    shown += [p for p in _PARTS if p not in shown and any(one[p] > 0 for one in epochs)]
    _draw_epochs(axes[0], sorted(state.times), epochs, shown)
    if sessions:
        _draw_sessions(axes[1], state.sessions, sessions, shown)
    add_legend(figure, {f"{part} {_share(totals[part], total)}": _patch(part) for part in shown})
    if title is None:
        unit, symbol = unit_of(total)
        progress = (totals["device"] + totals["dispatch"]) / total
        title = f"{total / unit:.3g} {symbol}, of which {progress:.0%} ran the step"
    figure.suptitle(title)
    return figure


def _of_epoch(time: EpochTime) -> dict[str, float]:
    parts = {name: 0.0 for name in _PARTS}
    for name in ("device", "data", "compile", "dispatch", "validation", "handlers", "saves"):
        parts[name] = float(getattr(time, f"{name}_s"))
    return parts


def _of_session(session: Session) -> dict[str, float]:
    return {name: float(getattr(session, f"{name}_s")) for name in _PARTS}


def _share(part: float, total: float) -> str:
    share = part / total
    return "< 1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _style(part: str) -> dict[str, Any]:
    colour, hatch = _PARTS[part]
    # A hatch takes the colour of the edge.
    return {"facecolor": colour, "hatch": hatch, "edgecolor": (1.0, 1.0, 1.0, 0.6), "linewidth": 0}


def _patch(part: str) -> Any:
    # Imported here, because matplotlib is an extra.
    from matplotlib.patches import Patch

    return Patch(**_style(part))


def _draw_epochs(
    axes: Axes, numbers: Sequence[int], epochs: Sequence[Mapping[str, float]], shown: Sequence[str]
) -> None:
    # Imported here, because matplotlib is an extra.
    from matplotlib.ticker import MaxNLocator

    unit, symbol = unit_of(max(sum(one.values()) for one in epochs))
    width = 0.8 if len(epochs) <= _MOST_BARS else 1.0
    bottom = np.zeros(len(epochs))
    for part in shown:
        height = np.array([one[part] for one in epochs]) / unit
        if width < 1:
            axes.bar(numbers, height, width, bottom=bottom, **_style(part))
        elif np.any(height):
            axes.fill_between(numbers, bottom, bottom + height, step="mid", **_style(part))
        bottom = bottom + height
    axes.set(xlabel="epoch (from 0)", ylabel=f"time ({symbol})")
    axes.set_title("each epoch, to its last step", loc="left", fontsize="medium")
    axes.set_xlim(min(numbers) - 0.6, max(numbers) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    tidy(axes)


def _draw_sessions(
    axes: Axes,
    sessions: Sequence[Session],
    parts: Sequence[Mapping[str, float]],
    shown: Sequence[str],
) -> None:
    unit, symbol = unit_of(max(sum(one.values()) for one in parts))
    places = np.arange(len(parts))
    left = np.zeros(len(parts))
    for part in shown:
        length = np.array([one[part] for one in parts]) / unit
        axes.barh(places, length, 0.7, left=left, **_style(part))
        left = left + length
    if len(sessions) <= 20:
        axes.set_yticks(places, [f"steps {one.first_step}\nto {one.last_step}" for one in sessions])
    else:
        axes.set_ylabel("session")
    axes.set_ylim(len(parts) - 0.4, -0.6)  # the first one at the top
    axes.set_xlabel(f"time ({symbol})")
    axes.set_title("each session", loc="left", fontsize="medium")
    tidy(axes)
