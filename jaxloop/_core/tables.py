"""Tables as lines of plain text.

print("\n".join(aligned([("step", "loss"), ("45", "0.5")])))
"""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns rows as lines whose cells begin in the same columns, two spaces apart.

    Example:
        >>> aligned([("step", "loss"), ("45", "0.5")])
        ['step  loss', '45    0.5']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
