"""Rows of numbers in a CSV file, with one row per step and one column per metric.

    loop = loop.write(csv("runs/digits/metrics.csv"))

Invariant: the file can be read at any time, and its header names every column.
"""

from __future__ import annotations

import csv as text_csv
import dataclasses
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxloop._checkpoint.names import check_path
from jaxloop.errors import ArgumentError
from jaxloop.writers._lines import LineFile, LineForm
from jaxloop.writers._protocol import WriterStart
from jaxloop.writers._values import Value


def csv(path: str | os.PathLike[str]) -> CsvDescription:
    """Describes a writer of numbers to a CSV file.

    The columns are ``step``, ``epoch`` and the metrics. Each number is written so that ``float``
    reads exactly the number in ``state.metrics``. NaN is ``nan``, infinity is ``inf``, and a metric
    that a row does not have is empty. Arrays, images, texts and histograms are left out, and so is
    a metric named ``step``. If a metric appears later, such as that of a validation, the file gets
    another column.

    A fresh run renames an earlier file, ``metrics.csv`` to ``metrics.1.csv``. A run that resumes
    drops the rows that it will write again.

    Args:
        path: The file. Missing folders are made.

    Returns:
        A description, to be passed to `Loop.write`.

    Raises:
        ArgumentTypeError: ``path`` is not a path.
        ArgumentError: ``path`` is empty or an address such as "gs://bucket". Raised by `run` if
            there are hyperparameters, for which a CSV file has no place.
        WriterError: Raised by `run`, before the first step, if the file was not written by this
            writer, or another run writes to it.

    Example:
        >>> import jaxloop as jl, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.csv")
        >>> loop = jl.loop(lambda batch, state: jl.emit(state, x=batch)).metric("x")
        >>> _ = loop.write(jl.writers.csv(path)).run([1.0, 2.0], epochs=2)
        >>> print(path.read_text())
        step,epoch,x
        2,0,1.5
        4,1,1.5
        <BLANKLINE>
    """
    return CsvDescription(check_path("csv", path))


@dataclasses.dataclass(frozen=True)
class CsvDescription:
    """A CSV file as a value. Made by `csv`.

    Attributes:
        path: The file.
    """

    path: str

    @property
    def where(self) -> str:
        """The file."""
        return self.path

    def open(self, start: WriterStart) -> CsvFile:
        """Opens the file for a run."""
        if start.hyperparameters:
            raise ArgumentError(
                "csv: hyperparameters must be empty, because a CSV file has no place for them",
                fix="pass them to another writer, such as jl.writers.jsonl(path)",
            )
        names = list(dict.fromkeys(["step", "epoch", *map(_one_line, start.metrics)]))
        form = LineForm("csv", _line(names), _is_header, _step_of)
        path = Path(self.path)
        return CsvFile(LineFile.open(path, start.step, form, keep_other=start.branches))


class CsvFile:
    """An open CSV file.

    Args:
        file: The file.
    """

    def __init__(self, file: LineFile) -> None:
        self._file = file
        self._columns = _cells(file.read().split(b"\n", 1)[0])
        self._last = dict(zip(self._columns, _cells(file.last), strict=False))

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Writes a row, or fills the empty cells of the last row if it has the same step."""
        texts = {_one_line(n): str(v) for n, v in values.items() if isinstance(v, int | float)}
        texts["step"] = str(step)
        old = self._last if self._last.get("step") == texts["step"] else {}
        row = {**texts, **{name: text for name, text in old.items() if text}}
        if old and row == {name: text for name, text in old.items() if text}:
            return
        new = [name for name in row if name not in self._columns]
        if new:
            self._grow(new)
        line = _line([row.get(name, "") for name in self._columns])
        if old:
            self._file.replace_last(line)
        else:
            self._file.append(line)
        self._last = row

    def flush(self) -> None:
        """Makes the rows durable."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _grow(self, names: list[str]) -> None:
        """Adds columns at the end."""
        padding = b"," * len(names)
        rows = self._file.read().splitlines(keepends=True)[1:]
        self._columns += names
        parts = [_line(self._columns), *(row[:-1] + padding + b"\n" for row in rows)]
        self._file.rewrite(parts, has_rows=bool(rows))


def _line(cells: Iterable[str]) -> bytes:
    text = io.StringIO()
    text_csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _cells(line: bytes) -> list[str]:
    return next(text_csv.reader([line.decode()]), [])


def _one_line(name: str) -> str:
    return " ".join(name.splitlines())


def _is_header(line: bytes) -> bool:
    # The header is never torn, because it is only ever written as a whole.
    return line == b"step,epoch\n" or (line.startswith(b"step,epoch,") and line.endswith(b"\n"))


def _step_of(line: bytes) -> int:
    return int(line.split(b",", 1)[0])
