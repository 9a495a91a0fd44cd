"""Trains a Flax model on handwritten digits, and plots loss and accuracy.

    jaxloop demo
    jaxloop demo --out runs/digits --epochs 20

If the demo is killed, run the same command again and it resumes. If it has finished, running it
again reports the same results. Compiled programs are kept in the user's cache folder, so that it
starts faster the next time.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

from jaxloop._core.extras import check_extra
from jaxloop.errors import ArgumentError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="the output folder")
    parser.add_argument("--epochs", type=int, default=40, help="the total number of epochs")


def run(options: argparse.Namespace) -> int:
    """Trains, writes ``metrics.csv`` and draws ``curves.png``."""
    if options.epochs < 1:
        raise ArgumentError(
            f"--epochs must be at least 1, got {options.epochs}", fix="pass a number from 1"
        )
    check_extra("matplotlib", what="the demo's plot", extra="demo")
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
    if state.status == "interrupted":
        print("interrupted; run the same command again to resume")
        return 130
    figure = jl.plot(state, metrics=["loss", "accuracy"], title="Handwritten digits")
    figure.savefig(options.out / "curves.png")
    best = max(float(metrics["validation_accuracy"]) for metrics in state.history.values())
    print(
        f"{state.status} after {state.epoch} epochs, {took_s:.1f} s; "
        f"best validation accuracy {best:.1%}\n"
        f"the curves and the metrics are in {options.out.resolve()}: curves.png, metrics.csv"
    )
    return 0


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
