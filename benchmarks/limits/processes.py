"""Fresh processes: the first epoch, a resumed run, and what they compile.

    figures = first_epoch(Effort(repeats=7))    # {"one metric, wall": Figure(1.47, ...), ...}

The processes take turns. Each runs the perceptron 64-64-10 on a list of batches.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.limits.child import STARTED
from benchmarks.limits.measure import Figure, Row, alternate

NUM_BATCHES = 44
KINDS = {
    "hand": ("child_hand",),
    "own step": ("child_loop", "own"),
    "trainer": ("child_loop", "trainer"),
}


class Process(NamedTuple):
    """The figures of one process."""

    wall_s: float
    cpu_s: float
    executables: list


def child(module, what, *rest, environment=()):
    """Runs one process and returns what it printed, or None."""
    command = [sys.executable, "-m", f"benchmarks.limits.{module}", what, str(NUM_BATCHES), *rest]
    # On a GPU, this process has taken most of the memory already.
    settings = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **dict(environment)}
    # An installed package has compiled modules, whatever is set here.
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    settings[STARTED] = repr(time.time())
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    lines = done.stdout.splitlines()
    return Process(**json.loads(lines[-1])) if lines else None


def in_turn(processes, repeats):
    """Returns the costs of processes, each a function that returns a `Process`."""
    return alternate(processes, repeats, measure=lambda process: process())


def against_hand(costs, suffix=""):
    """Returns the wall and CPU figures of all cases against `hand`."""
    figures = {}
    for name in costs:
        for field, key in {"wall": "wall_s", "CPU": "cpu_s"}.items():
            if name != "hand":
                figure = costs.ratio(name, "hand", key)
                own, hand = costs.median(name, key), costs.median("hand", key)
                best = costs.best(name, key) / costs.best("hand", key)
                detail = f"{own:.2f} to {hand:.2f} s, best {best:.2f}"
                figures[f"{name}{suffix}, {field}"] = Figure(figure.value, detail)
    return figures


def first_epoch(effort):
    """Compares the first epoch, from the creation of the loop on, with the hand-written loop."""
    processes = {
        "hand": lambda: child("child_hand", "first"),
        "trainer": lambda: child("child_loop", "first", "trainer"),
        "one metric": lambda: child("child_loop", "first", "own", "1"),
        "five metrics": lambda: child("child_loop", "first", "own", "5"),
    }
    names = {"hand", *effort.some(list(processes))}
    processes = {name: one for name, one in processes.items() if name in names}
    return against_hand(in_turn(processes, effort.few_repeats))


@contextmanager
def saved(names):
    """Yields a function that starts a process of a kind, which resumes from a saved run."""
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            module, *kind = KINDS[name]
            child(module, "save", *kind, str(Path(root, name)))

        def resume(name, environment=()):
            module, *kind = KINDS[name]
            copy = Path(root, "copy")  # a resumed run writes to its folder
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(Path(root, name), copy)
            return child(module, "resume", *kind, str(copy), environment=environment)

        yield resume


def resumed(effort):
    """Compares a resumed run, from the start of the process to the end of its first block.

    The hand-written loop restores with Orbax. The persistent compilation cache is off or warm.
    """
    kinds = ["hand", *effort.some(["own step", "trainer"])]
    with saved(kinds) as resume, tempfile.TemporaryDirectory() as cache:
        off = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
        warm = {
            "JAX_ENABLE_COMPILATION_CACHE": "1",
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        figures = {}
        for suffix, environment in effort.some([("", off), (", warm cache", warm)]):
            if environment is warm:
                for name in kinds:
                    resume(name, warm)
            cases = {name: lambda n=name, e=environment: resume(n, e) for name in kinds}
            figures |= against_hand(in_turn(cases, effort.few_repeats), suffix)
    return figures


def executables(effort):
    """Counts the executables that are compiled before the first block or epoch is done."""
    names, found = effort.some(["own step", "trainer"]), {}
    with saved(names) as resume:
        for name in names:
            module, kind = KINDS[name]
            found[f"{name}, fresh"] = child(module, "fresh", kind)
            found[f"{name}, resumed"] = resume(name)
    return {
        name: Figure(len(process.executables), ", ".join(process.executables))
        for name, process in found.items()
    }


ROWS = {
    "first_epoch": Row(
        "first epoch of a fresh process, against a hand-written loop",
        first_epoch,
        {"one metric, wall": 1.30, "five metrics, wall": 1.60},
    ),
    "resumed": Row(
        "new process that resumes, to the end of its first block, against a hand-written loop",
        resumed,
        {
            f"{name}{suffix}, {field}": 1.25
            for name in ("own step", "trainer")
            for suffix in ("", ", warm cache")
            for field in ("wall", "CPU")
        },
    ),
    "executables": Row(
        "executables compiled before the end of the first block",
        executables,
        {
            "own step, fresh": 1,
            "trainer, fresh": 2,  # the init function of the model, and the block
            "own step, resumed": 1,
            "trainer, resumed": 1,
        },
        "executables",
    ),
}
