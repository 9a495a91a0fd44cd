"""Follows a run that another process trains: its metrics and its checkpoints as they come.

    jaxloop watch runs/digits
    jaxloop watch runs/digits --once
    jaxloop watch runs/digits/metrics.jsonl | tee log.txt

PATH is the path= of Loop.checkpoint, the folder above it, or a file of jl.writers.csv or
jl.writers.jsonl. If a folder has such a file, its rows are shown, otherwise the epochs in the
newest checkpoint. It ends when the run ends, or with Ctrl-C. The run is not disturbed, and nothing
is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxloop._checkpoint.lock import Owner
from jaxloop._checkpoint.names import check_path
from jaxloop._cli.console import (
    is_terminal,
    live_text,
    scalar,
    table_lines,
    table_width,
    text_of_seconds,
    text_of_value,
    width_of,
)
from jaxloop._cli.folders import Folder, find_folder
from jaxloop._cli.inspect import status_of
from jaxloop._cli.rows import SUFFIXES, Row, RowFile, place_of
from jaxloop.errors import ArgumentError, CheckpointError

_SILENT_S = 45.0
"""The seconds after which a lock on another machine, that nobody touches, counts as stale."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("path", metavar="PATH", help="the folder of a run, or its file of metrics")
    parser.add_argument("--once", action="store_true", help="print how the run is now, and end")
    parser.add_argument(
        "--every", type=float, default=1.0, metavar="SECONDS", help="how often to look (1)"
    )


def run(options: argparse.Namespace) -> int:
    """Shows the run until it ends."""
    if not 0.01 <= options.every <= 3600:
        raise ArgumentError(
            f"--every must be from 0.01 to 3600 seconds, got {options.every}", fix="pass 1"
        )
    view = View(Path(check_path("PATH", options.path)).absolute())
    view.look()
    if options.once:
        print("\n".join(view.page()))
        return 0
    with contextlib.suppress(KeyboardInterrupt), _shown(view) as show:
        show()
        while not view.has_ended:
            time.sleep(options.every)
            view.look()
            show()
            if view.has_ended:
                time.sleep(min(options.every, 1.0))  # its writers close after its last checkpoint
                view.look()
                show()
    return 0


class View:
    """What is known of a run.

    Args:
        path: A folder or a file of rows.

    Raises:
        CheckpointError: The path does not exist, or has nothing of a run.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: RowFile | None = None
        self._folder: Folder | None = None
        self._last_rows: deque[Row] = deque(maxlen=_MOST_ROWS)
        self._events: list[str] = []
        self._known_checkpoints: set[tuple[str, int]] = set()
        self._last_epoch = -1
        self._touched: tuple[float, float] = (0.0, time.monotonic())
        if path.is_file():
            self._rows = RowFile(path)
            return
        found = find_folder(path)
        self._rows = _newest_rows(path)
        if found is None and self._rows is None:
            raise CheckpointError(
                f"PATH must be a folder of a run, got {path}, which has no checkpoints and no rows "
                "of metrics",
                fix="pass the path= of Loop.checkpoint, or the file of jl.writers.csv",
            )

    def look(self) -> None:
        """Reads what is new."""
        if not self._path.is_file():
            with contextlib.suppress(CheckpointError):  # it may be moved or emptied meanwhile
                self._folder = find_folder(self._path)
        if self._folder is not None:
            self._see_checkpoints(self._folder)
        if self._rows is not None:
            with contextlib.suppress(FileNotFoundError):
                for row in self._rows.poll():
                    self._add(row)

    @property
    def has_ended(self) -> bool:
        """Whether no process writes to the folder. Of a file alone, this is unknown."""
        return self._folder is not None and not self._is_alive(self._folder.owner)

    def new_events(self) -> list[str]:
        """Returns a line for each row and each checkpoint since the last call."""
        events, self._events = self._events, []
        return events

    def page(self) -> list[str]:
        """Returns the lines of a view of everything."""
        lines = [str(self._path), *self.status_lines(), ""]
        return lines + (_table(list(self._last_rows)) if self._last_rows else ["no metrics so far"])

    def end_line(self) -> str:
        """Returns how the run ended."""
        newest = None if self._folder is None else self._folder.newest
        if newest is None or newest.state is None:
            return "the run ended without a checkpoint"
        status = status_of(newest.state)
        if newest.state.status == "running":
            return f"the run ended without being finished; its newest checkpoint: {status}"
        return f"the run ended: {status}"

    def status_lines(self) -> list[str]:
        """Returns who writes, how far the run is, and the newest checkpoint."""
        if self._folder is None:
            return []
        newest = self._folder.newest
        if newest is None or newest.state is None:
            return [self._folder.writer, "no complete checkpoint so far"]
        age_s = newest.age_s
        age = "" if age_s is None else f", {text_of_seconds(age_s)} old"
        return [
            self._folder.writer,
            f"newest checkpoint {newest.name}{age}: {status_of(newest.state)}",
        ]

    def _is_alive(self, owner: Owner | None) -> bool:
        if owner is None or owner.is_running is not None:
            return owner is not None and bool(owner.is_running)
        # On another machine, only the touches tell, and its clock may differ from this one.
        if owner.touched_at != self._touched[0]:
            self._touched = (owner.touched_at, time.monotonic())
        return time.monotonic() - self._touched[1] < _SILENT_S

    def _see_checkpoints(self, folder: Folder) -> None:
        for one in reversed(folder.checkpoints):
            key = (one.name, one.entry.order)
            if key in self._known_checkpoints:
                continue
            self._known_checkpoints.add(key)
            if one.problem:
                self._events.append(f"checkpoint {one.name} is damaged: {one.problem}")
            else:
                best = ", the best so far" if one.entry.value is not None else ""
                self._events.append(f"checkpoint {one.name}: step {one.entry.step}{best}")
        newest = folder.newest
        if self._rows is None and newest is not None and newest.state is not None:
            for epoch, metrics in newest.state.history.items():
                if epoch > self._last_epoch:
                    self._last_epoch = epoch
                    self._add({"epoch": epoch, **metrics})

    def _add(self, row: Row) -> None:
        if self._last_rows and place_of(self._last_rows[-1]) == place_of(row):
            self._last_rows.pop()
        self._last_rows.append(row)
        self._events.append(text_of_row(row))


_MOST_ROWS = 10
"""How many rows the view has."""


def text_of_row(row: Row) -> str:
    """Returns the numbers of a row in a line.

    Example:
        >>> text_of_row({"step": 45, "epoch": 0, "loss": 0.25, "name": "a"})
        'step 45, epoch 0, loss 0.25'
    """
    numbers = {name: value for name, value in row.items() if scalar(value) is not None}
    return ", ".join(f"{name} {text_of_value(value)}" for name, value in numbers.items())


def _table(rows: list[Row]) -> list[str]:
    """Returns rows as a table, with as many columns as fit."""
    names = list(
        dict.fromkeys(n for row in rows for n, value in row.items() if scalar(value) is not None)
    )
    cells = [[text_of_value(row[n]) if n in row else "" for n in names] for row in rows]
    width = table_width()
    while width is not None and len(names) > 1 and width_of(names, cells) > width:
        names, cells = names[:-1], [row[:-1] for row in cells]
    return table_lines(names, cells, split=width is not None)


@contextlib.contextmanager
def _shown(view: View) -> Iterator[Callable[[], None]]:
    """Returns a function that shows a view: drawn anew in a terminal, as new lines in a pipe."""
    if is_terminal():
        with live_text() as draw:
            yield lambda: draw(view.page())
        if view.has_ended:
            print(view.end_line())
        return
    for line in view.status_lines():
        print(line)

    def show() -> None:
        for line in view.new_events():
            print(line)
        sys.stdout.flush()

    yield show
    if view.has_ended:
        print(view.end_line())


def _newest_rows(folder: Path) -> RowFile | None:
    """Returns the file of rows in a folder that was written last, or None."""
    files = [one for one in folder.iterdir() if one.suffix in SUFFIXES and one.is_file()]
    files = [one for one in files if RowFile(one).is_rows]
    return RowFile(max(files, key=lambda one: one.stat().st_mtime_ns)) if files else None
