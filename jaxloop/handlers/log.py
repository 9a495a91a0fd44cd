"""Lines of text about a run, written by an observer.

loop.log(lambda s: f"epoch {s.epoch}: {s.metrics['loss']:.4f}", event="epoch_completed")
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import IO

import numpy as np

from jaxloop.state import Snapshot


def line_writer(
    message_fn: Callable[[Snapshot], str], file: IO[str] | None
) -> Callable[[Snapshot], None]:
    """An observer that writes ``message_fn(snapshot)`` as a line."""

    def write(snapshot: Snapshot) -> None:
        # Looked up at each line: notebooks and tests replace sys.stdout.
        print(message_fn(snapshot), file=sys.stdout if file is None else file, flush=True)

    return write


def progress_line(snapshot: Snapshot) -> str:
    """Epoch, batch and every scalar metric, as the trainer's own log shows them.

    Example:
        >>> progress_line(Snapshot(epoch=1, iteration=50))
        'epoch 1, batch 50'
    """
    parts = [f"epoch {snapshot.epoch}", f"batch {snapshot.iteration}"]
    parts += [
        f"{name} {float(value):.4f}"
        for name, value in snapshot.metrics.items()
        if np.ndim(value) == 0
    ]
    return ", ".join(parts)
