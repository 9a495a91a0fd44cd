"""Lines of text about a run, written by an observer.

    line = lambda s: f"epoch {s.epoch}: {s.metrics['loss']:.4f}"
    loop = log(loop, line, event="epoch_completed")

Logging never changes a run, because an observer only reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import IO

from jaxloop._core.checks import as_number, check_callable
from jaxloop._core.events import Event, EventLike
from jaxloop._core.filters import FilterLike, every
from jaxloop._core.state import Snapshot
from jaxloop._core.times import EpochTime
from jaxloop._spec import SpecT
from jaxloop.handlers.attach import observe


def log(
    loop: SpecT,
    message_fn: Callable[[Snapshot], str],
    *,
    event: EventLike = "iteration_completed",
    filter: FilterLike = "always",
    file: IO[str] | None = None,
) -> SpecT:
    """Writes ``message_fn(snapshot)`` as a line of text, from an observer.

    A metric that a handler such as `validate` adds is in ``snapshot.metrics`` from then on to the
    end of the epoch, so use ``snapshot.metrics.get(name)`` if it may be missing.

    Args:
        loop: The loop.
        message_fn: Makes the line.
        event: See `handle`.
        filter: See `observe`.
        file: The file to write to. Defaults to standard output.

    Returns:
        A new loop with the log.

    Raises:
        ArgumentTypeError: ``message_fn`` is not callable.

    Example:
        >>> import jaxloop as jl
        >>> line = lambda s: f"epoch {s.epoch}"
        >>> loop = jl.loop(lambda b, s: s).log(line, event="epoch_completed")
        >>> _ = loop.run([1], epochs=2)
        epoch 0
        epoch 1
    """
    check_callable("log", "message_fn", message_fn)

    def write(snapshot: Snapshot) -> None:
        # Looked up at each line, because notebooks and tests replace sys.stdout.
        print(message_fn(snapshot), file=sys.stdout if file is None else file, flush=True)

    return observe(loop, event, write, filter, name="log")


def log_progress(loop: SpecT, every_n: int) -> SpecT:
    """Attaches the trainer's own log.

    It prints a line every ``every_n`` iterations and at the end of each epoch. At the end of the
    run, it prints how the time was spent.
    """
    loop = log(loop, progress_line, filter=every(every_n, per="epoch"))
    loop = log(loop, progress_line, event=[Event.EPOCH_COMPLETED, Event.EPOCH_HALTED])
    return log(loop, times_line, event=[Event.COMPLETED, Event.HALTED])


def progress_line(snapshot: Snapshot) -> str:
    """Returns a line with the epoch, the batch and every scalar metric.

    Example:
        >>> progress_line(Snapshot(epoch=1, iteration=50))
        'epoch 1, batch 50'
    """
    parts = [f"epoch {snapshot.epoch}", f"batch {snapshot.iteration}"]
    numbers = {name: as_number(value) for name, value in snapshot.metrics.items()}
    parts += [f"{name} {number:.4f}" for name, number in numbers.items() if number is not None]
    return ", ".join(parts)


def times_line(snapshot: Snapshot) -> str:
    """Returns a line that says how the time of the epochs was spent.

    Example:
        >>> from jaxloop._core.lazy import EpochRecords
        >>> times = EpochRecords.of({0: EpochTime(2.0, data_s=1.0, dispatch_s=0.5)})
        >>> times_line(Snapshot(lazy_times=times))
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
