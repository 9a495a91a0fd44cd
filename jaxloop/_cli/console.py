"""Tables and numbers for people: with `rich` in a terminal, as plain text in a pipe.

show_table(["name", "step"], [["120", "120"]])
text_of_bytes(2048), text_of_value(0.123456789)     # "2.0 kB", "0.1235"
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxloop._core.tables import aligned


def table_width() -> int | None:
    """Returns the columns that a table may have, or None in a pipe, where any number is fine."""
    return shutil.get_terminal_size().columns if is_terminal() else None


def width_of(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Returns how wide `show_table` makes a table in a terminal."""
    lines = [[_widest_line(_header(column)) for column in columns], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return sum(widths) + 2 * (len(widths) - 1)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table. The plain form has the columns aligned, and two spaces between them."""
    if is_terminal():
        # Imported here, because only a terminal needs it.
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for column in columns:
            table.add_column(Text(_header(column)), vertical="bottom")
        for row in rows:
            table.add_row(*map(Text, row))  # a name may look like rich's markup
        Console().print(table)
        return
    print("\n".join(table_lines(columns, rows)))


def table_lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, split: bool = False
) -> list[str]:
    """Returns a table as lines of plain text.

    Args:
        columns: The names of the columns.
        rows: The cells of each row.
        split: Whether long names take two lines.

    Example:
        >>> table_lines(["step", "loss"], [["45", "0.5"]])
        ['step  loss', '45    0.5']
    """
    names = [_header(column).rpartition("\n") for column in columns] if split else []
    head = [[first for first, _, _ in names]] if any(first for first, _, _ in names) else []
    head.append([last for _, _, last in names] if split else list(columns))
    return aligned([*head, *rows])


def is_terminal() -> bool:
    """Returns whether standard output is a terminal."""
    return sys.stdout.isatty()


@contextlib.contextmanager
def live_text() -> Iterator[Callable[[Sequence[str]], None]]:
    """Returns a function that shows lines of text in place of those before them."""
    # Imported here, because only a terminal needs it.
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        yield lambda lines: live.update(
            Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides what other libraries print to standard error, also from other threads.

    If Orbax cannot read an array, it abandons its other reads. Each of them prints a traceback when
    it is freed.
    """
    sys.stderr.flush()
    hook, kept = sys.unraisablehook, os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    finally:
        sys.unraisablehook = hook
        os.dup2(kept, 2)
        os.close(kept)


def _header(column: str) -> str:
    """Returns a name on two lines, if it is long."""
    first, sign, rest = column.partition("_")
    return f"{first}{sign}\n{rest}" if rest and len(column) > 12 else column


def _widest_line(text: str) -> str:
    return max(text.split("\n"), key=len)


def text_of_value(value: Any) -> str:
    """Returns a metric's value in four digits, or the shape of an array.

    Example:
        >>> text_of_value(np.float32(0.1)), text_of_value(3), text_of_value(np.zeros((2, 2)))
        ('0.1', '3', 'float64[2,2]')
    """
    number = scalar(value)
    if number is not None:
        return f"{number:.4g}" if isinstance(number, float) else str(number)
    if hasattr(value, "shape"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return str(value)[:40]


def scalar(value: Any) -> float | int | None:
    """Returns a number as a Python number, or None if the value is no single real number.

    Example:
        >>> scalar(np.float32(2)), scalar(True), scalar("a")
        (2.0, 1, None)
    """
    try:
        if np.ndim(value) == 0 and np.asarray(value).dtype.kind in "biu":
            return int(value)
        if np.ndim(value) == 0 and not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError):
        pass
    return None


def plain(value: Any) -> Any:
    """Returns a value for JSON, which has no NaN: numbers that are not finite become strings.

    Example:
        >>> plain({"a": np.float32(1), "b": [float("nan")]})
        {'a': 1.0, 'b': ['nan']}
    """
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if value is None or isinstance(value, bool | str):
        return value
    number = scalar(value)
    if number is not None:
        return number if math.isfinite(number) else str(number)
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def text_of_bytes(size: int) -> str:
    """Returns a size with a unit.

    Example:
        >>> text_of_bytes(900), text_of_bytes(1_500_000)
        ('900 B', '1.5 MB')
    """
    scaled, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while scaled >= 1000 and len(units) > 1:
        scaled /= 1000
        units.pop(0)
    return f"{scaled:.0f} B" if units[0] == "B" else f"{scaled:.1f} {units[0]}"


def text_of_seconds(seconds: float) -> str:
    """Returns a time in its largest unit.

    Example:
        >>> text_of_seconds(4.2), text_of_seconds(200), text_of_seconds(90_000)
        ('4 s', '3 min', '25 h')
    """
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"
