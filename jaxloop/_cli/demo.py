"""Trains a Flax model on handwritten digits, and plots loss and accuracy.

    jaxloop demo
    jaxloop demo --out runs/digits --epochs 20

If the demo is killed, run the same command again and it resumes. If it has finished, running it
again reports the same results. Compiled programs are kept in the user's cache folder, so that it
starts faster the next time.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxloop.errors import ArgumentError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="the output folder")
    parser.add_argument("--epochs", type=int, default=40, help="the total number of epochs")


def run(options: argparse.Namespace) -> int:
    """Trains, and writes ``curves.png`` and ``metrics.csv``."""
    if options.epochs < 1:
        raise ArgumentError(
            f"--epochs must be at least 1, got {options.epochs}", fix="pass a number from 1"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError(
            "the demo needs matplotlib for its plot, got none",
            fix="pip install 'functional-jaxloop[demo]'",
        )
    options.out.mkdir(parents=True, exist_ok=True)
    if "jax" not in sys.modules:
        keep_programs()
    # Imported here, because `jaxloop demo --help` needs neither JAX nor Flax.
    import jaxloop as jl
    from jaxloop._cli.digits import make_loop

    train, validation = jl.datasets.digits()
    began = time.perf_counter()
    state = make_loop(options.out, jl.batches(validation, 128)).final_state(
        jl.batches(train, 32, shuffle=True, pad=True), epochs=options.epochs
    )
    took_s = time.perf_counter() - began
    write_csv(options.out / "metrics.csv", state.history)
    draw(options.out / "curves.png", state.history)
    best = max(float(metrics["validation_accuracy"]) for metrics in state.history.values())
    print(
        f"{state.status} after {state.epoch} epochs, {took_s:.1f} s; "
        f"best validation accuracy {best:.1%}\n"
        f"the curves and the metrics are in {options.out.resolve()}: curves.png, metrics.csv"
    )
    return 0


def write_csv(path: Path, history: Mapping[int, Mapping[str, Any]]) -> None:
    """Writes the history as CSV, one row per epoch."""
    names = list(next(iter(history.values())))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *names])
        for epoch, metrics in history.items():
            writer.writerow([epoch, *(float(metrics[name]) for name in names)])


def draw(path: Path, history: Mapping[int, Mapping[str, Any]]) -> None:
    """Plots loss and accuracy by epoch."""
    # Imported here, because matplotlib is an optional dependency that only the plot needs.
    import matplotlib

    matplotlib.use("Agg")
    # Imported after the backend is chosen.
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    epochs = [epoch + 1 for epoch in history]
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for prefix, label in (("", "training"), ("validation_", "validation")):
            axis.plot(epochs, [float(m[prefix + name]) for m in history.values()], label=label)
        axis.set(xlabel="epoch", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle("Handwritten digits")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def keep_programs() -> None:
    """Lets JAX keep compiled programs on disk, if the user has not chosen a folder for them."""
    # Imported here, because `jaxloop demo --help` does not need JAX.
    import jax

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]  # an option
        return
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        root = given if given.is_absolute() else Path.home() / ".cache"
        # By machine: the programs are made for its processor, and several may share the folder.
        folder = root / "jaxloop" / platform.node()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # it cannot be written, or the user has no home
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # By default, JAX keeps only programs that took more than a second to compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
