"""Progress as HTML: a table of the epochs, and the tables of the summary.

    html = page(Epochs(), meter.now(), None)

Invariant: everything that is not ours is escaped, and no colour is set, so that a page can be read
in light and dark notebooks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape

from jaxloop._progress.figures import duration, in_seconds, rate
from jaxloop._progress.meter import View
from jaxloop._progress.summary import Summary, Table

_MOST_EPOCHS = 30
_CELL = "padding:2px 10px;text-align:{}"


@dataclasses.dataclass
class Epochs:
    """The rows of the table of epochs.

    Attributes:
        rows: For each epoch its name, its metrics and its seconds.
    """

    rows: list[tuple[str, dict[str, str], float]] = dataclasses.field(default_factory=list)

    def names(self, view: View) -> list[str]:
        """Returns the names of all metrics."""
        names: dict[str, None] = {}
        for _, metrics, _ in self.rows[-_MOST_EPOCHS:]:
            names.update(dict.fromkeys(metrics))
        return list({**names, **dict.fromkeys(name for name, _ in view.metrics)})


def page(epochs: Epochs, view: View | None, shown: Summary | None, failure: str = "") -> str:
    """Returns the HTML of a run.

    Args:
        epochs: The epochs that have ended.
        view: What is shown now, or None if the run ended in order.
        shown: The summary of a run that has ended, or None.
        failure: What ended the run, or "".

    Example:
        >>> html = page(Epochs(), View(epochs=1, max_epochs=4), None)
        >>> "<progress" in html, "1/4" in html
        (True, True)
    """
    parts = [] if view is None else [_bars(view, failure)]
    parts.append(_epoch_table(epochs, view))
    if shown is not None:
        parts.append(f'<div style="margin-top:8px"><b>{escape(shown.headline)}</b></div>')
        tables = "".join(
            f'<div style="margin:4px 24px 4px 0">{table_html(table)}</div>'
            for table in shown.tables
        )
        parts.append(f'<div style="display:flex;flex-wrap:wrap">{tables}</div>')
        parts += [f"<div>{escape(note)}</div>" for note in shown.notes]
    return f'<div style="overflow-x:auto">{"".join(parts)}</div>'


def table_html(table: Table, last_style: str = "") -> str:
    """Returns a table as HTML."""
    rows = [_row(table.columns, "th")]
    for row in table.rows:
        rows.append(_row(row, "td", last_style if row is table.rows[-1] else ""))
    return f'<table style="border-collapse:collapse">{"".join(rows)}</table>'


def _row(cells: Sequence[str], tag: str, style: str = "") -> str:
    made = "".join(
        f'<{tag} style="{_CELL.format("left" if i == 0 else "right")}">{escape(cell)}</{tag}>'
        for i, cell in enumerate(cells)
    )
    return f'<tr style="{style}">{made}</tr>'


def _bars(view: View, failure: str) -> str:
    if failure:
        return f"<div><b>{escape(failure)}</b>, last seen at {_counts(view)}</div>"
    share = view.share
    value = "" if share is None else f' value="{share:.4f}"'
    left = "" if view.left_s is None else f", {duration(view.left_s)} left"
    rates = view.note
    if view.batches_per_s is not None:
        rates = rate(view.batches_per_s, "batch").replace("/s", " batches/s")
    if view.examples_per_s is not None:
        rates += f", {rate(view.examples_per_s, 'example').replace('/s', ' examples/s')}"
    return (
        f'<div><progress{value} style="width:240px"></progress> {_counts(view)} '
        f"&middot; {duration(view.elapsed_s)}{left} &middot; {rates}</div>"
    )


def _counts(view: View) -> str:
    parts = []
    if view.max_epochs is not None:
        parts.append(f"epochs {view.epochs:,}/{view.max_epochs:,}")
    if view.max_steps is not None:
        parts.append(f"steps {view.steps:,}/{view.max_steps:,}")
    total = "" if view.max_batches is None else f"/{view.max_batches:,}"
    return ", ".join([*parts, f"batches {view.batches:,}{total}"])


def _epoch_table(epochs: Epochs, view: View | None) -> str:
    names = epochs.names(view or View())
    rows = [
        (name, *(metrics.get(one, "") for one in names), in_seconds(seconds))
        for name, metrics, seconds in epochs.rows[-_MOST_EPOCHS:]
    ]
    now = view is not None and bool(view.metrics) and not view.between
    if view is not None and now:
        values = dict(view.metrics)
        rows.append((str(view.epochs), *(values.get(one, "") for one in names), ""))
    if not rows:
        return ""
    table = table_html(Table(("epoch", *names, "time"), tuple(rows)), "opacity:0.6" if now else "")
    left_out = len(epochs.rows) - _MOST_EPOCHS
    return table if left_out <= 0 else f"<div>{left_out:,} earlier epochs</div>{table}"
