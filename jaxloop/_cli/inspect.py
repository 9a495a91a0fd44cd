"""Lists the checkpoints in a folder: steps, metrics, sizes, the best one, damage, and who writes.

    jaxloop inspect runs/digits
    jaxloop inspect runs/digits/checkpoints/270
    jaxloop inspect runs/digits --json | jq '.checkpoints[].step'

PATH is the path= of Loop.checkpoint, the folder above it, or one checkpoint. Nothing is changed,
and the run may be going on. The arrays are not read: `jaxloop verify` checks them.
"""

from __future__ import annotations

import argparse
import datetime
import json
from typing import Any

from jaxloop._checkpoint.contents import leaves_of
from jaxloop._cli.console import (
    plain,
    scalar,
    show_table,
    table_width,
    text_of_bytes,
    text_of_seconds,
    text_of_value,
    width_of,
)
from jaxloop._cli.folders import Checkpoint, Folder, open_folder
from jaxloop._core.state import Snapshot, State


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("path", metavar="PATH", help="a folder of checkpoints, or a checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON, with all values")


def run(options: argparse.Namespace) -> int:
    """Prints the table, or the same as JSON."""
    folder = open_folder(options.path)
    if options.json:
        print(json.dumps(plain(_as_json(folder)), indent=2))
        return 0
    print(f"{folder.path}: {_count(folder)}")
    newest = folder.newest
    if newest is not None:
        print(_run_line(newest))
    print(folder.writer)
    if folder.checkpoints:
        print()
        _show(folder)
    for name in folder.unfinished:
        print(f"{name} is not complete")
    for one in folder.checkpoints:
        if one.problem:
            print(f"{one.name} is damaged: {one.problem}")
    return 0


def _count(folder: Folder) -> str:
    number = len(folder.checkpoints)
    total = text_of_bytes(sum(one.size_bytes for one in folder.checkpoints))
    return f"{number} checkpoint{'' if number == 1 else 's'}, {total}"


def _run_line(newest: Checkpoint) -> str:
    state = newest.state
    assert state is not None
    used = state.environment
    where = f", jax {used['jax']} on {used['device_kind']}" if "device_kind" in used else ""
    return f"run {_run_of(newest)}: {status_of(state)}{where}"


def _run_of(one: Checkpoint) -> str:
    return (one.entry.run_id or "unknown")[:7]


def status_of(state: Snapshot) -> str:
    """Returns how far a run is, in words.

    Example:
        >>> status_of(Snapshot(max_epoch=9, step=80))
        'running, 0/9 epochs, step 80'
    """
    halted = f" by {state.halted_by}" if state.halted_by else ""
    most = "" if state.max_step is None else f"/{state.max_step}"
    return f"{state.status}{halted}, {epochs_of(state)} epochs, step {state.step}{most}"


def epochs_of(state: Snapshot) -> str:
    """Returns how many epochs are finished, and how many there will be if that is known."""
    finished = max(state.history, default=-1) + 1
    return f"{finished}" if state.max_epoch is None else f"{finished}/{state.max_epoch}"


def _show(folder: Folder) -> None:
    """Prints a row for each checkpoint, and a column for each metric that is a number."""
    found = folder.checkpoints
    metrics = list(dict.fromkeys(name for one in found for name in _numbers(one)))
    best, runs = folder.best, {one.entry.run_id for one in found if one.entry.record}
    rows = [[*_first_cells(one), *_last_cells(one, best, len(runs) > 1)] for one in found]
    columns = ["name", "step", "epochs", "size", "age", *(["run"] if len(runs) > 1 else []), ""]
    shown = _add_metrics(columns, rows, [_numbers(one) for one in found], metrics)
    show_table(columns, rows)
    if shown < len(metrics):
        print(f"not shown, because the terminal is narrow: {', '.join(metrics[shown:])}")


def _numbers(one: Checkpoint) -> dict[str, Any]:
    metrics = one.state.metrics if one.state else {}
    return {name: value for name, value in metrics.items() if scalar(value) is not None}


def _first_cells(one: Checkpoint) -> list[str]:
    step = str(one.entry.step) if one.entry.record else ""
    return [one.name, step, epochs_of(one.state) if one.state else ""]


def _last_cells(one: Checkpoint, best: Checkpoint | None, has_runs: bool) -> list[str]:
    age_s = one.age_s
    age = "" if age_s is None else text_of_seconds(age_s)
    run = [_run_of(one)] if has_runs else []
    mark = "damaged" if one.problem else "best" if one is best else ""
    return [text_of_bytes(one.size_bytes), age, *run, mark]


def _add_metrics(
    columns: list[str], rows: list[list[str]], values: list[dict[str, Any]], names: list[str]
) -> int:
    """Adds the columns of metrics that fit beside the others, and returns how many do."""
    width = table_width()
    for i, name in enumerate(names):
        cells = [text_of_value(one.get(name, "")) for one in values]
        more = [[*row[: 3 + i], cell, *row[3 + i :]] for row, cell in zip(rows, cells, strict=True)]
        wider = [*columns[: 3 + i], name, *columns[3 + i :]]
        if width is not None and width_of(wider, more) > width:
            return i
        columns[:], rows[:] = wider, more
    return len(names)


def _as_json(folder: Folder) -> dict[str, Any]:
    best, owner = folder.best, folder.owner
    return {
        "folder": str(folder.path),
        "checkpoints": [_one_as_json(one, one is best) for one in folder.checkpoints],
        "unfinished": list(folder.unfinished),
        "writer": None
        if owner is None
        else {
            "process": owner.process,
            "since": owner.since,
            "is_running": owner.is_running,
            "touched_at": owner.touched_at,
        },
    }


def _one_as_json(one: Checkpoint, best: bool) -> dict[str, Any]:
    state, saved_at = one.state, one.saved_at
    return {
        "name": one.name,
        "step": one.entry.step if one.entry.record else None,
        **({} if state is None else _state_as_json(state)),
        "best": best,
        "value": one.entry.value,
        "size_bytes": one.size_bytes,
        "saved_at": None if saved_at is None else _iso(saved_at),
        "run_id": one.entry.run_id,
        "saved_by": one.entry.saved_by,
        "step_state": {
            path: f"{dtype}[{','.join(map(str, shape))}]"
            for path, (dtype, shape) in leaves_of(one.entry).items()
        },
        "problem": one.problem or None,
    }


def _state_as_json(state: State[Any]) -> dict[str, Any]:
    return {
        "epoch": state.epoch,
        "max_epoch": state.max_epoch,
        "iteration": state.iteration,
        "max_step": state.max_step,
        "status": state.status,
        "halted_by": state.halted_by,
        "metrics": state.metrics,
        "history": state.history,
        "environment": state.environment,
    }


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
