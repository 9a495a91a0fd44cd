"""Rows of values in a file with one JSON object per line, one per step.

    loop = loop.write(jsonl("runs/digits/metrics.jsonl"))

Invariant: every complete line is valid JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxloop._checkpoint.names import check_path
from jaxloop.writers._lines import LineFile, LineForm
from jaxloop.writers._protocol import WriterStart
from jaxloop.writers._values import Histogram, Image, Text, Value


def jsonl(path: str | os.PathLike[str]) -> JsonlDescription:
    """Describes a writer to a file of JSON lines.

    Each line has ``step``, ``epoch`` and the values of a step. Arrays are lists, texts are strings,
    a histogram is ``{"counts": [...], "edges": [...]}``, and images are left out. Every line is
    valid JSON, which has no NaN and no infinity: NaN is ``null``, and infinity is ``1e999``, which
    JSON parsers read as infinity. Hyperparameters are in the first line, with step 0.

    A fresh run renames an earlier file, ``metrics.jsonl`` to ``metrics.1.jsonl``. A run that
    resumes drops the lines that it will write again.

    Args:
        path: The file. Missing folders are made.

    Returns:
        A description, to be passed to `Loop.write`.

    Raises:
        ArgumentTypeError: ``path`` is not a path.
        ArgumentError: ``path`` is empty or an address such as "gs://bucket".
        WriterError: Raised by `run`, before the first step, if the file was not written by this
            writer, or another run writes to it.

    Example:
        >>> import jaxloop as jl, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
        >>> loop = jl.loop(lambda batch, state: jl.emit(state, x=batch)).metric("x")
        >>> _ = loop.write(jl.writers.jsonl(path)).run([1.0, 2.0], epochs=2)
        >>> print(path.read_text())
        {"step": 2, "epoch": 0, "x": 1.5}
        {"step": 4, "epoch": 1, "x": 1.5}
        <BLANKLINE>
    """
    return JsonlDescription(check_path("jsonl", path))


@dataclasses.dataclass(frozen=True)
class JsonlDescription:
    """A file of JSON lines as a value. Made by `jsonl`.

    Attributes:
        path: The file.
    """

    path: str

    @property
    def where(self) -> str:
        """The file."""
        return self.path

    def open(self, start: WriterStart) -> JsonlFile:
        """Opens the file for a run."""
        form = LineForm("jsonl", b"", _is_own, _step_of)
        lines = LineFile.open(Path(self.path), start.step, form, keep_other=start.branches)
        file = JsonlFile(lines)
        if start.hyperparameters and not lines.last:
            file.write_raw(0, {"hyperparameters": dict(start.hyperparameters)})
        return file


class JsonlFile:
    """An open file of JSON lines.

    Args:
        lines: The file.
    """

    def __init__(self, lines: LineFile) -> None:
        self._lines = lines

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Writes a line, or adds to the last one if it has the same step."""
        self.write_raw(step, {n: v for n, v in values.items() if not isinstance(v, Image)})

    def write_raw(self, step: int, values: Mapping[str, Any]) -> None:
        """Does the same with any values of JSON."""
        last = self._lines.last
        if last and _step_of(last) == step:
            known = json.loads(last)
            new = {name: value for name, value in values.items() if name not in known}
            if new:
                self._lines.replace_last(last.rstrip()[:-1] + b", " + _encode(new)[1:].encode())
            return
        row = {"step": step, **{name: value for name, value in values.items() if name != "step"}}
        self._lines.append(_encode(row).encode())

    def flush(self) -> None:
        """Makes the lines durable."""
        self._lines.flush()

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


def _encode(values: Mapping[str, Any]) -> str:
    return f"{{{', '.join(f'{json.dumps(n)}: {_to_json(v)}' for n, v in values.items())}}}\n"


def _to_json(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return _to_json(_as_lists(value))
    if isinstance(value, Text):
        return json.dumps(value.text)
    if isinstance(value, Histogram):
        return _to_json({"counts": value.counts, "edges": value.edges})
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{json.dumps(str(n))}: {_to_json(v)}' for n, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_to_json, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return "null" if math.isnan(value) else "1e999" if value > 0 else "-1e999"
    return json.dumps(value, default=str)


def _as_lists(array: np.ndarray[Any, Any]) -> Any:
    if array.dtype.kind == "c":
        return np.stack([array.real, array.imag], -1).tolist()
    if array.dtype.kind == "V":  # bfloat16 and its relatives
        return array.astype(np.float64).tolist()
    return array.tolist()


_BEGINS = b'{"step": '


def _is_own(line: bytes) -> bool:
    return line.startswith(_BEGINS) or _BEGINS.startswith(line)


def _step_of(line: bytes) -> int:
    step = json.loads(line)["step"] if line.startswith(_BEGINS) else None
    if not isinstance(step, int):
        raise ValueError(f"expected a step, got {step!r}")
    return step
