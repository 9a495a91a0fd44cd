"""Draws the curves of a run, or of several for comparison, as a picture.

    jaxloop plot runs/digits
    jaxloop plot runs/digits --out digits.svg --metric loss --log
    jaxloop plot runs/adam runs/sgd --out comparison.png
    jaxloop plot runs/digits/metrics.csv

PATH is a folder of checkpoints, the folder above it, one checkpoint, or a file of jl.writers.csv or
jl.writers.jsonl. The curves of a folder are those in its newest checkpoint. Nothing in it is
changed. Without --out, the picture is curves.png in the current folder. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jaxloop as jl
from jaxloop._checkpoint.names import check_path
from jaxloop._cli.folders import open_folder
from jaxloop._cli.rows import RowFile, history_of
from jaxloop.errors import ArgumentError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a folder or file of a run")
    parser.add_argument(
        "--out", type=Path, default=Path("curves.png"), help="the picture: .png, .svg or .pdf"
    )
    parser.add_argument(
        "--metric", action="append", metavar="NAME", help="draw this metric only; may be repeated"
    )
    parser.add_argument("--log", action="store_true", help="use a logarithmic scale")


def run(options: argparse.Namespace) -> int:
    """Draws and saves the picture."""
    _check_out(options.out)
    runs = {path: _run_of(path) for path in options.paths}
    figure = jl.plot(
        runs if len(runs) > 1 else next(iter(runs.values())),
        metrics=options.metric,
        log_scale=options.log,
    )
    figure.savefig(options.out)
    print(options.out.resolve())
    return 0


def _check_out(out: Path) -> None:
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ArgumentError(
            f"--out must end in .png, .svg or .pdf, got {out}", fix="pass --out curves.png"
        )
    if not out.absolute().parent.is_dir():
        raise ArgumentError(
            f"--out must be in a folder that exists, got {out}",
            fix=f"mkdir -p {out.parent}",
        )


def _run_of(path: str) -> Any:
    """Returns the state in the newest checkpoint of a folder, or the history in a file."""
    given = Path(check_path("PATH", path)).absolute()
    if given.is_file():
        history = history_of(RowFile(given).read())
        if not history:
            raise ArgumentError(f"PATH must have rows of metrics, got none in {given}")
        return history
    folder = open_folder(path)
    newest = folder.newest
    if newest is None or newest.state is None or not newest.state.history:
        raise ArgumentError(
            f"PATH must have a checkpoint after a finished epoch, got {folder.path} without one",
            fix="wait for the first epoch, or see `jaxloop inspect`",
        )
    return newest.state
