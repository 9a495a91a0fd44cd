"""Numbers, durations and names as short text.

    number(0.03214159)          # '0.0321'
    duration(3725.0)            # '1:02:05'
    rate(0.25, "batch")         # '4.0 s/batch'
    wrapped(["loss 0.1", "accuracy 0.9"], width=12, indent=2)

Invariant: the results contain no control characters, whatever a metric is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxloop._core.checks import as_number

_SMALL, _LARGE = 1e-3, 1e6
"""Numbers between these have four decimals, and others an exponent."""


def number(value: object) -> str | None:
    """Returns a scalar as text, or None if it is not one real number.

    Example:
        >>> number(0.5), number(1.5e-5), number(np.int64(1234567)), number({"a": 1})
        ('0.5000', '1.500e-05', '1234567', None)
    """
    as_float = as_number(value)
    if as_float is None:
        return None
    array = np.asarray(value)
    if array.dtype.kind in "iub":
        return str(int(array.item()))
    if as_float == 0.0 or not math.isfinite(as_float) or _SMALL <= abs(as_float) < _LARGE:
        return f"{as_float:.4f}"
    return f"{as_float:.3e}"


def named_numbers(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the names and the values of the metrics that are numbers."""
    numbers = [(clean(name), number(value)) for name, value in metrics.items()]
    return [(name, text) for name, text in numbers if text is not None]


def clean(text: str) -> str:
    """Returns text with a question mark in place of each character that does not print.

    Example:
        >>> clean("loss" + chr(27) + "[2J")
        'loss?[2J'
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def counted(count: int, one: str, many: str | None = None) -> str:
    """Returns a number of things in words.

    Example:
        >>> counted(1, "epoch"), counted(2000, "step"), counted(2, "batch", "batches")
        ('1 epoch', '2,000 steps', '2 batches')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """Returns a duration for a clock.

    Example:
        >>> duration(7.9), duration(75), duration(90061)
        ('0:07', '1:15', '25:01:01')
    """
    whole = int(seconds)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def in_seconds(seconds: float) -> str:
    """Returns a duration for a table.

    Example:
        >>> in_seconds(0.0123), in_seconds(12.345), in_seconds(7384)
        ('0.01 s', '12.3 s', '2:03:04')
    """
    if seconds >= 600:
        return duration(seconds)
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def percent(share: float) -> str:
    """Returns a share of 1 in percent.

    Example:
        >>> percent(0.256)
        '26 %'
    """
    return f"{share:.0%}".replace("%", " %")


def rate(per_second: float, one: str) -> str:
    """Returns a rate, or its inverse if that is easier to read.

    Example:
        >>> rate(612.3, "batch"), rate(39_200, "batch"), rate(2.5e6, "batch"), rate(0.4, "batch")
        ('612/s', '39.2k/s', '2.5M/s', '2.5 s/batch')
    """
    if 0 < per_second < 1:
        return f"{1 / per_second:.1f} s/{one}"
    if per_second >= 999_950:
        return f"{per_second / 1e6:.1f}M/s"
    if per_second >= 9_999.5:
        return f"{per_second / 1e3:.1f}k/s"
    return f"{per_second:.1f}/s" if per_second < 9.95 else f"{per_second:.0f}/s"


def shortened(text: str, width: int, *, ascii_only: bool = False) -> str:
    """Returns text that is at most ``width`` long. The end of a longer one is left out.

    Example:
        >>> shortened("validation_accuracy", 12, ascii_only=True)
        'validatio...'
    """
    if len(text) <= width:
        return text
    mark = "..." if ascii_only else "…"
    return text[: max(0, width - len(mark))] + mark[: max(0, width)]


def wrapped(
    parts: Sequence[str], width: int, *, indent: int = 0, most: int | None = None, gap: str = "  "
) -> list[str]:
    """Returns parts in lines, none of which is wider than ``width``. No part is split.

    Args:
        parts: The parts. One that is wider than a line is shortened.
        width: The width of a line.
        indent: The number of spaces before every line but the first.
        most: The maximum number of lines. The last one says how many parts are left out.
        gap: What is between two parts.

    Example:
        >>> wrapped(["epoch 3", "loss 0.1", "accuracy 0.9"], 20, indent=2)
        ['epoch 3  loss 0.1', '  accuracy 0.9']
        >>> wrapped(["a 1", "b 2", "c 3", "d 4"], 16, most=1)
        ['a 1  b 2  +2']
    """
    room = max(8, width)
    lines: list[str] = []
    line, num_left = "", len(parts)
    for part in parts:
        last = most is not None and len(lines) == most - 1
        tail = f"{gap}+{num_left - 1}" if last and num_left > 1 else ""
        margin = " " * indent if lines else ""
        joined = f"{line}{gap}{part}" if line else f"{margin}{part}"
        if line and len(joined) + len(tail) > room:
            if last:
                return [*lines, shortened(f"{line}{gap}+{num_left}", room)]
            lines.append(line)
            joined = " " * indent + part
        line = shortened(joined, room)
        num_left -= 1
    return [*lines, line] if line else lines
