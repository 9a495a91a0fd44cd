"""A script that trains the digits, kills itself at a given moment, and resumes when run again.

    python -m tests.crash.script <folder> <epochs>              # one run; prints its digest
    python -m tests.crash.script <folder> <epochs> --serve      # a process for each line of input

A line of input is ``<result> <kind> <n> <delay in s>``: the process kills itself at the n-th moment
of a kind, or so many seconds later, and writes its digest to the file ``<result>`` if it gets to
its end. The kinds are "event" (an event of the loop), "write" (a file operation of a save) and
"row" (a row that a writer writes). The rows go to a folder beside that of the checkpoints.
Moments are counted and not timed, so a slow machine is killed in the same places as a fast one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint  # noqa: F401  imported once, before the forks
from flax import nnx

import jaxloop as jl
from jaxloop import writers
from tests.digest import digest


class Center(nnx.Variable):
    """A kind of variable of the user's own, which no framework knows."""


class Model(nnx.Module):
    """A model with all that a preemption could reset: streams, statistics and an own variable."""

    def __init__(self):
        rngs = nnx.Rngs(0, dropout=1)
        self.first, self.second = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)
        self.drop, self.norm = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(32, rngs=rngs)
        self.noise = nnx.Rngs(noise=2)
        self.center = Center(jnp.zeros(64))

    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        if not self.drop.deterministic:
            self.center[...] = 0.99 * self.center[...] + 0.01 * x.mean(0)
            x = x + 0.01 * self.noise.noise.normal(x.shape)
        x = nnx.relu(self.norm(self.first(x - self.center[...])))
        return self.second(self.drop(x))


WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}


class Killer:
    """Kills this process at the n-th moment of a kind."""

    def __init__(self, folder: str, kind: str, n: int, delay_s: float) -> None:
        self._kind, self._left, self._delay_s = kind, n, delay_s
        self._lock = threading.Lock()
        if kind == "write":
            prefix = os.path.abspath(folder)

            def audit(event: str, arguments: tuple[object, ...]) -> None:
                if event in WRITES and str(arguments[0]).startswith(prefix):
                    self.moment("write")

            sys.addaudithook(audit)

    def moment(self, kind: str) -> None:
        """Counts a moment."""
        if kind != self._kind:
            return
        with self._lock:
            self._left -= 1
            now = self._left == 0
        if now and not self._delay_s:
            os.kill(os.getpid(), signal.SIGKILL)
        elif now:
            # The run continues in the meantime.
            later = threading.Timer(self._delay_s, os.kill, (os.getpid(), signal.SIGKILL))
            later.daemon = True
            later.start()


class KillingWriter:
    """A writer that writes nothing, in a thread like those of the others."""

    def __init__(self, killer: Killer) -> None:
        self._killer = killer

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Counts a moment."""
        self._killer.moment("row")

    def close(self) -> None:
        """Does nothing."""


def rows_of(folder: str) -> Path:
    """Returns the folder of the rows, whose file operations are not those of a save."""
    return Path(folder).with_name(f"rows-of-{Path(folder).name}")


def main(folder: str, epochs: int, killer: Killer | None = None) -> dict[str, str]:
    """Trains to the end; returns the digest."""
    train, validation = jl.datasets.digits()
    look = {"event": "iteration_completed", "filter": jl.every(37)}
    loss = optax.softmax_cross_entropy_with_integer_labels
    loop = (
        jl.trainer(Model(), loss, optax.adam(1e-2), log=0)
        .metric("accuracy")
        .validate(jl.batches(validation, 128), **look)
        .reduce_lr_on_plateau("validation_loss", patience=1, cooldown=1, factor=0.7, **look)
        .early_stop("validation_loss", patience=5, restore_best=True, **look)
        .checkpoint(folder, event="iteration_completed", filter=jl.every(11))
        .resume(folder)
    )
    rows = rows_of(folder)
    if killer is not None:
        loop = loop.observe("all", lambda snapshot: killer.moment("event"))
        loop = loop.write(KillingWriter(killer), every=5)
    loop = loop.write(writers.csv(rows / "metrics.csv"), every=5)
    loop = loop.write(
        writers.jsonl(rows / "metrics.jsonl"),
        every=15,
        values=writers.histograms(),
        hyperparameters={"epochs": epochs},
    )
    loop = loop.write(writers.tensorboard(rows / "tensorboard"), every=5)
    data = jl.batches(train, 32, shuffle=True, pad=True)
    output = []

    def both(state):
        output.append(jax.device_get(state.step_state["model_state"]))
        return state

    # What `run` returns is made from the best state; the state that is saved is the last.
    best = loop.run(data, epochs=epochs, output_transform=both)
    last = jl.restore(folder, like=best)
    texts = {path.name: path.read_text() for path in (rows / "metrics.csv", rows / "metrics.jsonl")}
    ended = {"step": str(last.step), "halted_by": str(last.halted_by)}
    return {**digest(last, output[-1]), **ended, **texts}


def serve(folder: str, epochs: int) -> None:
    """Forks a process for each line; all of them share what was imported before."""
    for line in sys.stdin:
        result, kind, n, delay_s = line.split()
        child = os.fork()
        if not child:
            os.setsid()
            killer = None if kind == "never" else Killer(folder, kind, int(n), float(delay_s))
            with open(result, "w") as file:
                file.write(json.dumps(main(folder, epochs, killer)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    # A process loads what an earlier one has compiled.
    jax.config.update("jax_compilation_cache_dir", os.environ.get("CRASH_CACHE"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if "--serve" in sys.argv:
        serve(sys.argv[1], int(sys.argv[2]))
    else:
        print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
