"""`plot_confusion_matrix`: which classes are taken for which.

    figure = plot_confusion_matrix(state.metrics["validation_confusion_matrix"], normalize="true")

The colours are those of cividis, whose lightness alone tells the values apart.

Source: Nuñez, Anderton, Renslow, "Optimizing colormaps with consideration for color vision
deficiency", 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from jaxloop._core.checks import in_words
from jaxloop._plotting.figures import new_figure
from jaxloop.errors import ArgumentError, ArgumentTypeError, ShapeError, unknown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Normalize: TypeAlias = Literal["true", "predicted", "all"] | None
"""What each cell is divided by: the sum of its row, of its column, or of all cells."""

_SUMS: dict[str, tuple[int, ...] | None] = {"true": (1,), "predicted": (0,), "all": None}
_SHARES = {"true": "true class", "predicted": "predicted class", "all": "all examples"}
_MOST_NUMBERS = 20
"""With more classes, the cells are too small for numbers."""
_MOST_LABELS = 40


def plot_confusion_matrix(
    matrix: Any,
    labels: Sequence[str] | None = None,
    *,
    normalize: Normalize = None,
    title: str | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Draws a confusion matrix, with the true classes as rows.

    Args:
        matrix: ``(classes, classes)``, counts or sums of weights, such as the value of
            ``jl.metrics.confusion_matrix(num_classes)``.
        labels: The names of the classes. Their numbers by default.
        normalize: None draws the counts. "true" divides each row by its sum, so that the diagonal
            is the recall of each class. "predicted" divides each column, so that it is the
            precision, and "all" divides by the sum of all cells. A sum of 0 gives empty cells.
        title: The title of the figure.
        figure: See `plot`.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ShapeError: The matrix is not square, or has another number of classes than ``labels``.
        ArgumentError: A number in the matrix is negative or not finite.
        UnknownNameError: ``normalize`` is unknown.

    Example:
        >>> figure = plot_confusion_matrix([[3, 1], [0, 4]], ["cat", "dog"], normalize="true")
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['75 %', '25 %', '0', '100 %']
    """
    counts = _checked(matrix)
    num = len(counts)
    if labels is not None and len(labels) != num:
        raise ShapeError(
            f"plot_confusion_matrix: labels must name {num} classes, got {len(labels)}",
            fix="pass one label per class, in the order of the class numbers",
        )
    if normalize is not None and normalize not in _SUMS:
        raise unknown_name("normalize", normalize, _SUMS)
    shown = counts
    if normalize is not None:
        total = counts.sum(axis=_SUMS[normalize], keepdims=True)
        shown = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    side = min(12.0, max(4.0, 1.6 + 0.45 * num))
    figure, (axes,) = new_figure(1, figure, size=(side + 1.0, side))
    most = 1.0
    if normalize is None or normalize == "all":
        most = float(np.nanmax(shown, initial=0.0)) or 1.0
    image = axes.imshow(shown, cmap="cividis", vmin=0, vmax=most)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("examples" if normalize is None else f"share of the {_SHARES[normalize]}")
    if normalize == "all":
        bar.set_label("share of all examples")
    if num <= _MOST_NUMBERS:
        _write_numbers(axes, shown, most, as_share=normalize is not None)
    _write_labels(axes, labels, num)
    axes.set(xlabel="predicted class", ylabel="true class")
    if title is not None:
        figure.suptitle(title)
    return figure


def _checked(matrix: Any) -> np.ndarray[Any, Any]:
    try:
        counts = np.asarray(matrix).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(
            f"plot_confusion_matrix: matrix must be an array of numbers, got {in_words(matrix)}",
            fix="pass the value of jl.metrics.confusion_matrix(num_classes)",
        ) from error
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ShapeError(
            f"plot_confusion_matrix: matrix must have shape (classes, classes), got {counts.shape}",
            fix="pass the value of jl.metrics.confusion_matrix(num_classes)",
        )
    if not np.all(np.isfinite(counts)) or np.any(counts < 0):
        raise ArgumentError(
            "plot_confusion_matrix: the numbers must be finite and at least 0, got "
            f"{counts[~(np.isfinite(counts) & (counts >= 0))][0]}",
            fix="pass counts or sums of weights",
        )
    return counts


def _write_numbers(axes: Axes, shown: np.ndarray[Any, Any], most: float, *, as_share: bool) -> None:
    size = 9 if len(shown) <= 12 else 7
    for (row, column), value in np.ndenumerate(shown):
        if np.isnan(value):
            continue
        # The upper half of cividis is light.
        colour = "white" if value < 0.55 * most else "black"
        axes.text(
            column,
            row,
            _number(float(value), as_share=as_share),
            ha="center",
            va="center",
            color=colour,
            fontsize=size,
        )


def _number(value: float, *, as_share: bool) -> str:
    if not as_share:
        return f"{value:.0f}" if value.is_integer() and value < 1e5 else f"{value:.3g}"
    if value == 0:
        return "0"
    return f"{100 * value:.0f} %" if value >= 0.01 else "< 1 %"


def _write_labels(axes: Axes, labels: Sequence[str] | None, num: int) -> None:
    # Imported here, because matplotlib is an extra.
    from matplotlib.ticker import MaxNLocator

    if num > _MOST_LABELS or (labels is None and num > _MOST_NUMBERS):
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        return
    texts = [str(label) for label in (range(num) if labels is None else labels)]
    long = max(map(len, texts)) > 3
    axes.set_xticks(range(num), texts, rotation=45 if long else 0, ha="right" if long else "center")
    axes.set_yticks(range(num), texts)
