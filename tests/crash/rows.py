"""A script that writes rows, kills itself after a while, and resumes when run again.

    python -m tests.crash.rows              # a process for each line of input

A line of input is ``<folder> <every> <every of the checkpoints> <seconds, or 0>``. The result does
not depend on when the process is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import orbax.checkpoint  # noqa: F401  imported once, before the forks
import tensorboardX.summary  # noqa: F401

import jaxloop as jl
from jaxloop import writers


def add_validation(state):
    """A metric that only the end of an epoch has."""
    return "continue", state.replace(metrics={**state.metrics, "validation_x": 7.0 + state.epoch})


def main(folder: Path, every: int, checkpoint_every: int) -> None:
    """Trains to the end."""
    loop = jl.loop(lambda batch, total: jl.emit(total + batch, x=batch)).metric("x")
    loop = loop.handle("epoch_completed", add_validation)
    loop = loop.write(writers.csv(folder / "metrics.csv"), every=every)
    loop = loop.write(
        writers.jsonl(folder / "metrics.jsonl"),
        every=every,
        values=lambda state: {"total": state.step_state},
        hyperparameters={"every": every},
    )
    loop = loop.write(
        writers.tensorboard(folder / "tensorboard"),
        every=every,
        values=lambda state: {"step": writers.Text(str(state.step))},
    )
    saved = {"event": "iteration_completed", "filter": jl.every(checkpoint_every)}
    loop = loop.checkpoint(folder / "saved", **saved, resume=True)
    loop.run([1.0, 2.0, 6.0, 3.0, 0.5], 0.0, epochs=12)


if __name__ == "__main__":
    for line in sys.stdin:
        folder, every, checkpoint_every, seconds = line.split()
        child = os.fork()
        if not child:
            if float(seconds):
                kill = threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL))
                kill.daemon = True
                kill.start()
            code = 1
            try:
                main(Path(folder), int(every), int(checkpoint_every))
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
