"""Lines of text about a run, written by an observer.

    line = lambda s: f"epoch {s.epoch}: {s.metrics['loss']:.4f}"
    loop = log(loop, line, event="epoch_completed")

Logging never changes a run, because an observer only reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import IO

from jaxloop._core.checks import check_callable
from jaxloop._core.events import EventLike
from jaxloop._core.filters import FilterLike
from jaxloop._core.state import Snapshot
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
