"""Lines of text about a run, written by an observer.

loop.log(lambda s: f"epoch {s.epoch}: {s.metrics['loss']:.4f}", event="epoch_completed")
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import IO

import numpy as np

from jaxloop._core.state import EpochTime, Snapshot


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


def times_line(snapshot: Snapshot) -> str:
    """Where the time of the epochs went, as the trainer's own log shows it at the end.

    Example:
        >>> from jaxloop._core.state import EpochTime
        >>> from jaxloop._core.lazy import Records
        >>> times = Records.known({0: EpochTime(2.0, data_s=1.0, dispatch_s=0.5)})
        >>> times_line(Snapshot(_times=times))
        '1 epoch in 2.00 s: 25 % device, 50 % waiting for data, 25 % dispatch, 0 % handlers'
    """
    times = [EpochTime.of(seconds) for seconds in snapshot.times.values()]
    total = sum(times) or 1.0
    shares = {
        "device": sum(time.device_s for time in times),
        "waiting for data": sum(time.data_s for time in times),
        "dispatch": sum(time.dispatch_s for time in times),
        "handlers": sum(time.handlers_s for time in times),
    }
    parts = ", ".join(f"{share / total:.0%} {name}" for name, share in shares.items())
    epochs = f"{len(times)} epoch{'s' * (len(times) != 1)}"
    return f"{epochs} in {sum(times):.2f} s: {parts}".replace("%", " %")
