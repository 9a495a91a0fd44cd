"""The bars and the metrics of a running loop, as styled text that fits the terminal.

    for line in frame(meter.now(), width=80):
        print("".join(span.text for span in line))

Invariant: no line is wider than the terminal, because a line that wraps leaves a copy of itself
behind when the frame is drawn again.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxloop._progress.figures import duration, rate, wrapped
from jaxloop._progress.meter import View

_LABEL = 8
_SHORTEST_BAR, _LONGEST_BAR = 8, 40
_TAIL = 28
"""The least width of what follows a bar, so that the bar keeps its width while that changes."""
_MOST_LINES = 2
"""The number of lines for the metrics."""


class Span(NamedTuple):
    """Text and its style, in the words of `rich`."""

    text: str
    style: str = ""


def frame(view: View, width: int, *, ascii_only: bool = False) -> list[list[Span]]:
    """Returns the lines of a frame.

    Args:
        view: What to show.
        width: The width of the terminal.
        ascii_only: Whether the terminal shows only ASCII characters.

    Example:
        >>> view = View(epochs=1, max_epochs=4, batches=5, max_batches=10, elapsed_s=3.0)
        >>> for line in frame(view, 72, ascii_only=True):
        ...     print("".join(span.text for span in line))
        epochs  ==========-------------------  1/4   0:03
        batches ==============---------------  5/10
    """
    width = max(1, width - 1)  # some terminals wrap after their last column
    rows = _rows(view)
    count_width = max(len(count) for _, _, count, _ in rows)
    room = width - _LABEL - count_width - 2
    tail_width = 2 + max(len(tail) for _, _, _, tail in rows)
    if room - tail_width < _SHORTEST_BAR:
        tail_width = 0
    elif room - _TAIL >= _SHORTEST_BAR:
        tail_width = max(tail_width, _TAIL)
    bar_width = min(_LONGEST_BAR, room - tail_width)
    lines = []
    for label, share, count, tail in rows:
        spans = [Span(label.ljust(_LABEL), "bold")]
        if bar_width >= _SHORTEST_BAR:
            spans += [*_bar(share, bar_width, ascii_only), Span("  ")]
        spans.append(Span(count.ljust(count_width) if tail and tail_width else count))
        if tail and tail_width:
            spans.append(Span(f"  {tail}", "cyan"))
        lines.append(_cut(spans, width))
    metrics = [f"{name} {value}" for name, value in view.metrics]
    lines += [[Span(text)] for text in wrapped(metrics, width, most=_MOST_LINES)]
    return lines


def _rows(view: View) -> list[tuple[str, float | None, str, str]]:
    """Returns the label, the share, the count and the rest of each bar."""
    clock = duration(view.elapsed_s)
    if view.left_s is not None:
        clock += f", {duration(view.left_s)} left"
    rates = view.note
    if view.batches_per_s is not None:
        rates = rate(view.batches_per_s, "batch")
        if view.examples_per_s is not None:
            rates += f", {rate(view.examples_per_s, 'example').replace('/s', ' examples/s')}"
    share = view.batches / view.max_batches if view.max_batches else None
    batches = ("batches", share, _of(view.batches, view.max_batches), rates)
    if view.max_epochs == 1 and view.max_steps is None:
        # The bar of the epochs would be the same.
        tail = f"{clock}  {rates}" if rates else clock
        return [("batches", share, _of(view.batches, view.max_batches), tail)]
    if view.max_epochs is None:
        return [("steps", view.share, _of(view.steps, view.max_steps), clock), batches]
    return [("epochs", view.share, _of(view.epochs, view.max_epochs), clock), batches]


def _of(count: int, total: int | None) -> str:
    return f"{count:,}" if total is None else f"{count:,}/{total:,}"


def _bar(share: float | None, width: int, ascii_only: bool) -> list[Span]:
    """Returns a bar. Its two parts differ in shape too, for terminals without colours."""
    done_mark, rest_mark = ("=", "-") if ascii_only else ("━", "─")
    if share is None:
        return [Span(rest_mark * width, "dim")]
    done = int(width * min(1.0, max(0.0, share)))
    return [Span(done_mark * done, "green"), Span(rest_mark * (width - done), "dim")]


def _cut(spans: list[Span], width: int) -> list[Span]:
    kept = []
    for text, style in spans:
        if text and width > 0:
            kept.append(Span(text[:width], style))
        width -= len(text)
    return kept
