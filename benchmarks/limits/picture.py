"""The picture of the table: how far each figure is from its bar.

    draw(Path("limits.png"), results)

Each figure is a dot at "times its bar". Dots left of the line at 1 meet their bars.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  # after the choice of a backend without a display

MET, MISSED = "#0072b2", "#d55e00"  # blue and vermilion of Okabe and Ito, for every kind of eyes


def draw(path, results, titles):
    """Draws the results that have a bar, one group for each row of the table.

    Args:
        path: Where to write the picture.
        results: The results, in the order of the table.
        titles: The title of each row.
    """
    results = [one for one in results if one.bar is not None]
    lines = []  # from top to bottom: a title, or a result
    for index, one in enumerate(results):
        if not index or results[index - 1].row != one.row:
            lines.append(titles[one.row])
        lines.append(one)
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.21 * len(lines)), layout="constrained")
    for height, line in enumerate(lines):
        if not isinstance(line, str):
            _dot(axis, height, line)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(0.5, axis.get_xlim()[0]), axis.get_xlim()[1] * 1.25)
    ticks = [
        t for t in (0.25, 0.5, 1, 2, 4, 8, 16) if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]
    ]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.set_yticks(range(len(lines)), [_name(line) for line in lines])
    for label, line in zip(axis.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if isinstance(line, str) else "normal")
        label.set_fontsize(8)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    met = sum(one.value <= one.bar for one in results)
    axis.set_title(f"{met} of {len(results)} figures meet their bars", loc="left", fontsize=11)
    axis.set_xlabel("measured, in times the bar (log scale): left of the line is better")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _name(line):
    return line if isinstance(line, str) else line.case


def _dot(axis, height, result):
    """Draws one figure as a dot, with a line from the bar and its value in words."""
    times, met = result.value / result.bar, result.value <= result.bar
    color = MET if met else MISSED
    axis.plot([1, times], [height, height], color=color, linewidth=1.5, solid_capstyle="butt")
    axis.plot(times, height, "o" if met else "D", color=color, markersize=5)
    unit = "" if result.unit in ("times", "executables") else f" {result.unit}"
    text = f"{result.value:.3g}{unit} (bar {result.bar:g})"
    right = max(times, 1)
    axis.annotate(
        text, (right, height), (6, 0), textcoords="offset points", va="center", fontsize=7
    )
