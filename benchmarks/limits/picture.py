"""The picture of the table: how far each figure is from its bar.

    draw(Path("limits.png"), results, titles)

Each row of the table is a line, and each of its figures is a dot at "times its bar". The figure
that is farthest from its bar is named. Dots left of 1 meet their bars.
"""

import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  # after the choice of a backend without a display

MET, MISSED = "#0072b2", "#d55e00"  # the blue and vermilion of Okabe and Ito: for color-blind eyes
LEAST = 0.25
TICKS = (0.25, 0.5, 0.8, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 16)


def draw(path, results, titles):
    """Draws the results that have a bar.

    Args:
        path: Where to write the picture.
        results: The results, in the order of the table.
        titles: The title of each row.
    """
    rows = {}
    for one in results:
        if one.bar is not None:
            rows.setdefault(one.row, []).append(one)
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.42 * len(rows)), layout="constrained")
    for height, row in enumerate(rows.values()):
        _line(axis, height, row)
    _scale(axis, [times_of(one) for row in rows.values() for one in row])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_yticks(range(len(rows)), [textwrap.fill(titles[row], 44) for row in rows], fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title(_title(rows), loc="left", fontsize=10)
    axis.set_xlabel("measured, in times the bar (log scale); left of 1 is better", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def times_of(result):
    """Returns how many times its bar a result is. Far below is as good as a quarter."""
    return max(result.value / result.bar, LEAST)


def _title(rows):
    flat = [one for row in rows.values() for one in row]
    met = sum(times_of(one) <= 1 for one in flat)
    return f"{met} of {len(flat)} figures meet their bars (blue dots); the worst of each is named"


def _scale(axis, times):
    """Sets a logarithmic axis that has room for the dots and for the text on their right."""
    low, high = min(0.8, *times) / 1.15, max(1.25, *times) * 1.05
    axis.set_xscale("log")
    axis.set_xlim(low, high * (high / low) ** 0.45)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axis.minorticks_off()
    axis.axvspan(low, 1, color=MET, alpha=0.07, linewidth=0)
    axis.axvline(1, color="black", linewidth=1)


def _line(axis, height, row):
    """Draws the figures of one row, and names the one that is farthest from its bar."""
    for one in row:
        met = times_of(one) <= 1
        color, marker = (MET, "o") if met else (MISSED, "D")
        axis.plot(times_of(one), height, marker, color=color, markersize=6, alpha=0.75)
    worst = max(row, key=times_of)
    unit = "" if worst.unit == "times" else f" {worst.unit}"
    axis.annotate(
        f"{worst.case}: {worst.value:.3g}{unit} (bar {worst.bar:g})",
        (max(times_of(worst), 1), height),
        (8, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )
