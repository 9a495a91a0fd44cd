"""What all pictures share: the figure, the colours, and numbers as text.

    figure, axes = new_figure(num_panels=3)
    axes[0].plot(x, y, **line(0))

The colours are those of Okabe and Ito, which people with any colour vision can tell apart. Lines
also differ by dash and marker, and areas by hatch, so that a picture works in grey too.

Source: Okabe, Ito, "Color Universal Design", 2008, https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxloop.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, SKY, VERMILION, PURPLE, GREY = COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#56B4E9",
    "#D55E00",
    "#CC79A7",
    "#7F7F7F",
)
MARKERS = "osD^vPX"
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "oo")
_DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.6)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
_PANEL_SIZE = (4.4, 3.1)
"""The width and the height of a panel in inches."""
_MOST_COLUMNS = 3


def new_figure(
    num_panels: int, figure: Figure | None = None, *, size: tuple[float, float] = _PANEL_SIZE
) -> tuple[Figure, list[Axes]]:
    """Makes a figure with some panels, in rows of at most three.

    Args:
        num_panels: The number of panels.
        figure: The figure to draw into, which is cleared. None makes a new one.
        size: The width and the height of a panel in inches. A given figure keeps its own size.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    columns = num_panels if num_panels <= _MOST_COLUMNS else 2 if num_panels == 4 else _MOST_COLUMNS
    rows = -(-num_panels // columns)
    if figure is None:
        try:
            # Imported here, because matplotlib is an extra.
            from jaxloop._plotting.canvas import LoopFigure
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "matplotlib":
                raise  # matplotlib is there, and something that it needs is not
            raise MissingExtraError("a picture", "matplotlib", "plot") from error
        width, height = size
        figure = LoopFigure(figsize=(columns * width, rows * height + 0.5), layout="constrained")
    else:
        figure.clear()
    axes = [figure.add_subplot(rows, columns, 1 + i) for i in range(num_panels)]
    return figure, axes


def tidy(axes: Axes) -> None:
    """Removes the frame that carries no information, and adds a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def line(index: int, num_points: int, dash: int = 0) -> dict[str, Any]:
    """Returns the style of a line.

    Args:
        index: The number of the line, which decides its colour and its marker.
        num_points: The number of points. The more there are, the fewer have a marker.
        dash: The number of its pattern. 0 is solid.
    """
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 3.5,
        # Not at the same points for each line, so that markers do not hide each other.
        "markevery": (0, 1) if num_points <= 30 else (3 * index, max(1, num_points // 12)),
        "linestyle": _DASHES[dash % len(_DASHES)],
        "linewidth": 1.4,
    }


def star() -> dict[str, Any]:
    """Returns the style of the mark of a best epoch, which stands out from every line."""
    return {
        "linestyle": "none",
        "marker": "*",
        "markersize": 13,
        "color": "#F0E442",
        "markeredgecolor": "black",
        "markeredgewidth": 0.8,
        "zorder": 5,
    }


def add_legend(figure: Figure, entries: Mapping[str, Any]) -> None:
    """Adds a legend below the panels, with as many columns as fit."""
    longest = max(map(len, entries))
    column = 0.08 * longest + 0.6  # inches
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=max(1, min(len(entries), int(figure.get_figwidth() / column))),
        frameon=False,
        columnspacing=1.2,
    )


def in_lines(name: str, most: int = 28) -> str:
    """Breaks a long name after an underscore or a slash.

    Example:
        >>> in_lines("mean_absolute_error"), in_lines("validation_of_the_second_head/loss")
        ('mean_absolute_error', 'validation_of_the_second_\\nhead/loss')
    """
    lines = [""]
    for part in re.findall(r"[^_/]*[_/]?", name):
        if lines[-1] and len(lines[-1]) + len(part) > most:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def as_text(value: float) -> str:
    """Returns a number with four significant digits.

    Example:
        >>> as_text(0.98764), as_text(12345.6), as_text(1e-9)
        ('0.9876', '1.235e+04', '1e-09')
    """
    return f"{value:.4g}"


def unit_of(seconds: float) -> tuple[float, str]:
    """Returns a unit in which a duration is a handy number, in seconds, and its symbol.

    Example:
        >>> unit_of(0.02), unit_of(90.0), unit_of(900.0)
        ((0.001, 'ms'), (1.0, 's'), (60.0, 'min'))
    """
    for unit, symbol, largest in ((1e-3, "ms", 1.0), (1.0, "s", 600.0), (60.0, "min", 36000.0)):
        if seconds < largest:
            return unit, symbol
    return 3600.0, "h"
