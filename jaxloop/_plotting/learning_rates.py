"""The picture of a learning rate range test.

figure = draw_rates(rates, losses, smoothed, suggestion=1e-2, label="learning rate")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxloop._plotting.figures import BLUE, GREY, VERMILION, add_legend, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]


def draw_rates(
    rates: Array,
    losses: Array,
    smoothed: Array,
    suggestion: float | None,
    label: str,
    *,
    figure: Figure | None = None,
) -> Figure:
    """Draws the losses of a test by rate.

    Args:
        rates: The rates.
        losses: The loss after the step of each.
        smoothed: The smoothed losses.
        suggestion: The rate to mark, or None.
        label: What the rates are.
        figure: See `jaxloop.plot`.
    """
    figure, (axes,) = new_figure(1, figure, size=(6.0, 3.6))
    legend: dict[str, Any] = {}
    (legend["loss of a batch"],) = axes.plot(
        rates, losses, linestyle="none", marker=".", color=GREY, alpha=0.7
    )
    (legend["smoothed"],) = axes.plot(rates, smoothed, color=BLUE, linewidth=1.6)
    if suggestion is not None:
        marked = axes.axvline(suggestion, color=VERMILION, linestyle=(0, (4, 1.6)), linewidth=1.4)
        legend[f"suggestion: {suggestion:.2g}"] = marked
    axes.set_xscale("log")
    if len(losses):
        # Diverging losses would flatten the rest.
        low, high = float(min(losses.min(), smoothed.min())), float(smoothed.max())
        margin = 0.15 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + 2 * margin)
    axes.set(xlabel=label, ylabel="loss")
    tidy(axes)
    add_legend(figure, legend)
    return figure
