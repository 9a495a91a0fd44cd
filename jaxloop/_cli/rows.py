"""Reads the rows of metrics that a run writes: a file of CSV or of JSON lines, or its history.

    rows = RowFile(Path("runs/digits/metrics.csv"))
    rows.poll()                 # [{"step": 45, "epoch": 0, "loss": 0.5}, ...]
    rows.poll()                 # those that are new or have changed since

The run may append to the file, change its last line, or replace it. An incomplete last line is read
later.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from jaxloop.errors import ArgumentError, DataError

Row: TypeAlias = dict[str, Any]
"""The values of one step or epoch, by name. One of the names is "step" or "epoch"."""

SUFFIXES = (".csv", ".jsonl")


class RowFile:
    """A file of rows.

    Args:
        path: The file, whose name ends in one of `SUFFIXES`.

    Raises:
        ArgumentError: The name has another ending.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in SUFFIXES:
            raise ArgumentError(
                f"PATH must be a folder or a file of {' or '.join(SUFFIXES)}, got {path}",
                fix="pass a file that jl.writers.csv or jl.writers.jsonl has written",
            )
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._last: Row | None = None

    def poll(self) -> list[Row]:
        """Returns the rows that are new or have changed since the last call.

        Raises:
            DataError: The file has other contents.
            OSError: The file cannot be read.
        """
        status = self._path.stat()
        seen = (status.st_ino, status.st_size, status.st_mtime_ns)
        if seen == self._seen:
            return []
        rows = self.read()
        self._seen = seen
        new = _since(rows, self._last)
        self._last = rows[-1] if rows else None
        return new

    def read(self) -> list[Row]:
        """Returns all complete rows.

        Raises:
            DataError: The file has other contents.
            OSError: The file cannot be read.
        """
        text = self._path.read_bytes().decode(errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()
        rows = _from_csv(lines) if self._path.suffix == ".csv" else _from_jsonl(lines)
        if rows is None:
            raise DataError(
                f"{self._path} must have rows with a step or an epoch, got other contents",
                fix="pass a file that jl.writers.csv or jl.writers.jsonl has written",
            )
        return rows

    @property
    def is_rows(self) -> bool:
        """Whether the file can be read, and has rows or is empty."""
        try:
            self.read()
        except (DataError, OSError):
            return False
        return True


def _since(rows: list[Row], last: Row | None) -> list[Row]:
    """Returns the rows after ``last``, and also that of its own place if it has changed."""
    if last is None:
        return rows
    if rows and place_of(rows[-1]) < place_of(last):  # the run resumed, and dropped rows
        return []
    return [
        row
        for row in rows
        # As text, because NaN is not equal to itself.
        if place_of(row) > place_of(last)
        or (place_of(row) == place_of(last) and str(row) != str(last))
    ]


def place_of(row: Mapping[str, Any]) -> float:
    """Returns the step of a row, or its epoch if it has no step."""
    return float(row["step"] if "step" in row else row["epoch"])


def history_of(rows: list[Row]) -> dict[int, dict[str, Any]]:
    """Returns ``{epoch: metrics}``, with the last row of each epoch, or of each step.

    Example:
        >>> history_of([{"step": 1, "epoch": 0, "a": 3.0}, {"step": 2, "epoch": 0, "a": 2.0}])
        {0: {'a': 2.0}}
    """
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        key = row.get("epoch", row.get("step"))
        values = {name: value for name, value in row.items() if name not in ("step", "epoch")}
        if key is not None and any(isinstance(value, int | float) for value in values.values()):
            found[int(key)] = values
    return found


def _from_csv(lines: list[str]) -> list[Row] | None:
    if not lines:
        return []
    try:
        header, *rows = csv.reader(lines)
    except csv.Error:
        return None
    if not {"step", "epoch"} & set(header):
        return None
    found = []
    for row in rows:
        cells = dict(zip(header, row, strict=False))
        values = {name: _number(text) for name, text in cells.items() if text}
        if not _has_place(values):
            return None
        found.append(values)
    return found


def _from_jsonl(lines: list[str]) -> list[Row] | None:
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict) or not _has_place(row):
            return None
        found.append({name: float("nan") if v is None else v for name, v in row.items()})
    return found


def _has_place(row: Row) -> bool:
    place = row.get("step", row.get("epoch"))
    return isinstance(place, int | float) and place >= 0


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
