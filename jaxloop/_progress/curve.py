"""The curves of a run, drawn with matplotlib during the run.

    curve = Curve()
    curve.end_epoch(snapshot)
    curve.png()                             # the bytes of a picture

Invariant: the number of points is bounded, and nothing of matplotlib's global state is used.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

from jaxloop._core.checks import as_number
from jaxloop._core.state import Snapshot
from jaxloop._progress.meter import View

_MOST_POINTS, _MOST_PANELS = 512, 6
# Colours and marks that the colour-blind can tell apart, from Okabe and Ito.
_LOOKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))


class Curve:
    """The values of the metrics so far, at the ends of epochs and in between."""

    def __init__(self) -> None:
        self._epochs: list[tuple[int, dict[str, float]]] = []
        self._steps: list[tuple[int, dict[str, float]]] = []

    @property
    def has_points(self) -> bool:
        """Whether there is anything to draw."""
        return len(self._epochs) > 1 or len(self._steps) > 1

    def see(self, view: View) -> None:
        """Takes in the metrics of an epoch so far."""
        numbers = {name: float(value) for name, value in view.metrics}
        if numbers and not (self._steps and self._steps[-1][0] == view.steps):
            self._steps.append((view.steps, numbers))
            self._steps = _thinned(self._steps)

    def end_epoch(self, snapshot: Snapshot) -> None:
        """Takes in the metrics of an epoch."""
        self._epochs.append((snapshot.epoch, _numbers(snapshot.metrics)))
        self._epochs = _thinned(self._epochs)

    def png(self) -> bytes:
        """Returns a picture: by epoch, or by step while there are not yet two epochs."""
        # Imported here, because only a notebook with plot=True needs it.
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        by_epoch = len(self._epochs) > 1
        points = self._epochs if by_epoch else self._steps
        panels = _panels(points)
        columns = min(3, len(panels)) or 1
        rows = math.ceil(len(panels) / columns) or 1
        figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained", dpi=96)
        for i, (title, names) in enumerate(panels.items()):
            axes = figure.add_subplot(rows, columns, i + 1)
            for name, (colour, mark) in zip(names, _LOOKS, strict=False):
                those = [(x, values[name]) for x, values in points if name in values]
                xs, ys = [x for x, _ in those], [y for _, y in those]
                few = mark if by_epoch and len(xs) <= 40 else None
                axes.plot(xs, ys, color=colour, marker=few, markersize=4, label=name)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("epoch" if by_epoch else "step")
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(names) > 1:
                axes.legend(fontsize=8)
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        return picture.getvalue()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: as_number(value) for name, value in metrics.items()}
    return {name: value for name, value in numbers.items() if value is not None}


def _thinned(points: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    """Returns every other point if there are too many. The last one stays."""
    return points if len(points) <= _MOST_POINTS else [*points[:-1:2], points[-1]]


def _panels(points: list[tuple[int, dict[str, float]]]) -> dict[str, list[str]]:
    """Returns the metrics of each panel: one that ends in the name of another goes with it.

    Example:
        >>> _panels([(0, {"loss": 1.0, "accuracy": 0.5, "validation_loss": 1.0})])
        {'loss': ['loss', 'validation_loss'], 'accuracy': ['accuracy']}
    """
    names = list(dict.fromkeys(name for _, values in points for name in values))
    panels: dict[str, list[str]] = {}
    for name in sorted(names, key=len):
        base = next((one for one in panels if name.endswith(f"_{one}")), name)
        panels.setdefault(base, []).append(name)
    ordered = {name: panels[name] for name in names if name in panels}
    return dict(list(ordered.items())[:_MOST_PANELS])
