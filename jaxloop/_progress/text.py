"""Snapshots and summaries as plain text.

    print(progress_line(snapshot))          # 'epoch 1, batch 50, loss 0.1234'
    print("\\n".join(text_of(shown, width=80)))

Invariant: only printable characters, and only those of ASCII besides what names contain.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxloop._core.state import Snapshot
from jaxloop._progress.figures import named_numbers, shortened, wrapped
from jaxloop._progress.summary import Summary, Table

_GAP = "   "


def progress_line(snapshot: Snapshot) -> str:
    """Returns a line with the epoch, the batch and every scalar metric.

    Example:
        >>> progress_line(Snapshot(epoch=1, iteration=50))
        'epoch 1, batch 50'
    """
    parts = [f"epoch {snapshot.epoch}", f"batch {snapshot.iteration}"]
    parts += [f"{name} {value}" for name, value in named_numbers(snapshot.metrics)]
    return ", ".join(parts)


def text_of(shown: Summary, width: int = 80) -> list[str]:
    """Returns a summary as lines. Tables are side by side where they fit.

    Example:
        >>> table = Table(("metric", "best"), (("loss", "0.1"), ("accuracy", "0.9")))
        >>> print("\\n".join(text_of(Summary("completed: 1 epoch", (table, table)), 40)))
        completed: 1 epoch
        metric    best   metric    best
        loss       0.1   loss       0.1
        accuracy   0.9   accuracy   0.9
    """
    lines = [shown.headline]
    blocks = [table_lines(table, width) for table in shown.tables]
    while blocks:
        row = [blocks.pop(0)]
        while blocks and sum(_width(block) + len(_GAP) for block in [*row, blocks[0]]) <= width:
            row.append(blocks.pop(0))
        lines += _beside(row)
    for note in shown.notes:
        words = note.split(" ")
        longest = 2 + max(map(len, words))  # a path is never shortened, because it is for copying
        lines += wrapped(words, max(width, longest), gap=" ", indent=2)
    return lines


def table_lines(table: Table, width: int = 80) -> list[str]:
    """Returns a table as lines, with its titles first.

    If it is too wide, the cells of its first column are shortened.

    Example:
        >>> table_lines(Table(("part", "", "share"), (("device", "1.0 s", "9 %"),)))
        ['part           share', 'device  1.0 s    9 %']
    """
    others = [
        max(len(row[i]) for row in [table.columns, *table.rows]) + 2
        for i in range(1, len(table.columns))
    ]
    room = max(8, width - sum(others))
    rows = [
        (shortened(first, room, ascii_only=True), *rest)
        for first, *rest in [table.columns, *table.rows]
    ]
    widths = [max(len(row[0]) for row in rows), *(other - 2 for other in others)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _width(block: Sequence[str]) -> int:
    return max(map(len, block))


def _beside(blocks: Sequence[Sequence[str]]) -> list[str]:
    height = max(map(len, blocks))
    widths = [_width(block) for block in blocks]
    return [
        _GAP.join(
            (block[i] if i < len(block) else "").ljust(width)
            for block, width in zip(blocks, widths, strict=True)
        ).rstrip()
        for i in range(height)
    ]
