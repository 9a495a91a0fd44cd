"""Progress in a notebook: a table that is updated during the run, and stays.

    form = Notebook(plot=True)
    form.start(view)
    form.draw(view)
    form.finish(summary, "")

Invariant: a saved notebook shows the last update, without widgets.
"""

from __future__ import annotations

import uuid
from typing import Any

from jaxloop._core.events import Event
from jaxloop._core.state import Snapshot
from jaxloop._progress.curve import Curve
from jaxloop._progress.figures import in_seconds, named_numbers
from jaxloop._progress.meter import View, clock
from jaxloop._progress.page import Epochs, page
from jaxloop._progress.summary import Summary
from jaxloop._progress.text import text_of

_INTERVAL_S, _CURVE_INTERVAL_S = 0.25, 1.0
_MOST_SHARE, _MOST_CURVE_SHARE = 0.02, 0.05


class Notebook:
    """Progress in a notebook.

    Args:
        plot: Whether it also draws a curve.

    Attributes:
        live: See `Lines`.
    """

    live = True

    def __init__(self, *, plot: bool) -> None:
        self._epochs = Epochs()
        self._view = View()
        self._table = _Output(_INTERVAL_S, _MOST_SHARE)
        self._curve = Curve() if plot else None
        self._picture = _Output(_CURVE_INTERVAL_S, _MOST_CURVE_SHARE)

    def start(self, view: View) -> None:
        """Shows the table."""
        self.draw(view)

    def draw(self, view: View) -> None:
        """Updates the table and the curve, unless that was done too recently."""
        self._view = view
        if self._curve is not None:
            self._curve.see(view)
        self._show(None, "")

    def batch(self, snapshot: Snapshot) -> None:
        """Shows nothing, because the table does."""

    def epoch(self, snapshot: Snapshot, view: View, seconds: float) -> None:
        """Adds an epoch to the table."""
        halted = " (halted)" if snapshot.event is Event.EPOCH_HALTED else ""
        metrics = dict(named_numbers(snapshot.metrics))
        self._epochs.rows.append((f"{snapshot.epoch}{halted}", metrics, seconds))
        if self._curve is not None:
            self._curve.end_epoch(snapshot)
        self.draw(view)

    def finish(self, shown: Summary | None, failure: str) -> None:
        """Shows the table for the last time."""
        self._show(shown, failure, last=True)

    def release(self) -> None:
        """Does nothing."""

    def _show(self, shown: Summary | None, failure: str, *, last: bool = False) -> None:
        if last or self._table.is_due():
            html = page(self._epochs, None if last and not failure else self._view, shown, failure)
            self._table.show({"text/html": html, "text/plain": self._text(shown)})
        curve = self._curve
        if curve is not None and curve.has_points and (last or self._picture.is_due()):
            self._picture.show({"image/png": curve.png(), "text/plain": "the curves of the run"})

    def _text(self, shown: Summary | None) -> str:
        """Returns what is shown where HTML is not."""
        lines = []
        for name, metrics, seconds in self._epochs.rows[-30:]:
            values = "".join(f", {metric} {value}" for metric, value in metrics.items())
            lines.append(f"epoch {name}, {in_seconds(seconds)}{values}")
        return "\n".join(lines + ([] if shown is None else text_of(shown)))


class _Output:
    """An output of a cell, which can be updated.

    Args:
        interval_s: The seconds between two updates.
        most_share: The share of the time that updates may take.
    """

    def __init__(self, interval_s: float, most_share: float) -> None:
        self._interval_s, self._most_share = interval_s, most_share
        self._id: str | None = None
        self._next_s = 0.0
        self._began_s = clock()

    def is_due(self) -> bool:
        """Returns whether the next update may be shown, and starts to measure its time."""
        self._began_s = clock()
        return self._began_s >= self._next_s

    def show(self, data: dict[str, Any]) -> None:
        """Shows data by their MIME types, in place of earlier ones."""
        # Imported here, because only a notebook has it.
        from IPython.display import display, update_display

        if self._id is None:
            self._id = uuid.uuid4().hex
            display(data, raw=True, display_id=self._id)
        else:
            update_display(data, raw=True, display_id=self._id)
        took_s = clock() - self._began_s
        self._next_s = self._began_s + max(self._interval_s, took_s / self._most_share)
