"""Writing metrics, and what is computed from the state, with a writer.

    loop = write(loop, csv("metrics.csv"))
    loop = write(loop, tensorboard("runs/a"), every=50, values=histograms())

The metrics come from an observer, so they change no block. The writer works in a thread.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import jax

from jaxloop._core.checks import check_callable, check_count, name_of
from jaxloop._core.events import Event
from jaxloop._core.filters import Filter, Firing, as_filter, every as every_nth
from jaxloop._core.state import Snapshot, State
from jaxloop._spec import Handler, Observer, RunStart, SpecT
from jaxloop.errors import ArgumentTypeError, WriterError, first_line
from jaxloop.writers import Writer, WriterDescription, WriterStart
from jaxloop.writers._delivery import Delivery
from jaxloop.writers._protocol import WriterLike
from jaxloop.writers._values import join, on_host, start_copies

ValuesFn: TypeAlias = Callable[[State[Any]], Mapping[str, Any]]
"""Makes more values for a writer from the state."""

_EPOCH_EVENTS = (Event.EPOCH_COMPLETED, Event.EPOCH_HALTED)


def write(
    loop: SpecT,
    writer: WriterLike,
    *,
    every: int | Filter | None = None,
    values: ValuesFn | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> SpecT:
    """Writes the metrics of each epoch with ``writer``, and those of each ``every`` iterations.

    The writer gets one row per step, in order, in a thread. Each row has ``epoch`` and the metrics
    of the epoch so far. The last row of an epoch also has what handlers such as `validate` added.
    If the run resumes from a checkpoint, no row is missing or doubled. A loop may have several
    writers.

    Args:
        loop: The loop.
        writer: Such as ``jl.writers.csv(path)``, or an object of your own with the methods
            ``write(step, values)`` and ``close()``.
        every: The number of iterations between two rows, or a filter such as
            ``jl.every_seconds(10)``. None writes a row per epoch.
        values: ``state -> {name: value}`` makes more values for the same rows: numbers, arrays,
            `writers.Image`, `writers.Text` or `writers.Histogram`. It is a handler: a block ends
            where it runs. Arrays on the device are copied to the host by the thread. See
            `writers.histograms` and `writers.predictions`.
        hyperparameters: ``{name: value}``, for writers that keep them.
        name: Its name in errors. Defaults to that of the writer.

    Returns:
        A new loop with the writer.

    Raises:
        ArgumentTypeError: An argument has the wrong type.
        ArgumentError: ``every`` is less than 1.
        WriterError: Raised by `run`: before the first step if the writer cannot be opened, and
            later if it fails.

    Example:
        >>> import jaxloop as jl
        >>> class Printer:
        ...     def write(self, step, values):
        ...         print(step, values)
        ...     def close(self):
        ...         print("the end")
        >>> loop = jl.loop(lambda batch, state: jl.emit(state, x=batch)).metric("x")
        >>> _ = loop.write(Printer(), every=2).run([1.0, 2.0, 6.0])
        2 {'epoch': 0, 'x': 1.5}
        3 {'epoch': 0, 'x': 3.0}
        the end
    """
    _check_writer(writer)
    cadence: Filter | None = None
    if isinstance(every, Filter):
        cadence = every
    elif every is not None:
        check_count("every", every, at_least=1, where="write")
        cadence = every_nth(every)
    if hyperparameters is not None and not isinstance(hyperparameters, Mapping):
        raise ArgumentTypeError(
            f"write: hyperparameters must be a dict of names and values, got {hyperparameters!r}",
            fix="pass a dict, such as {'learning_rate': 1e-3}",
        )
    rows = Rows(
        writer, cadence, dict(hyperparameters or {}), name or f"write_{_name_of_writer(writer)}"
    )
    if values is not None:
        check_callable("write", "values", values)
        loop = rows.attach_values(loop, values)
    return rows.attach(loop)


def _check_writer(writer: object) -> None:
    if isinstance(writer, type) or not isinstance(writer, WriterDescription | Writer):
        raise ArgumentTypeError(
            "write: writer must have the methods write(step, values) and close(), or open(start), "
            f"got {writer!r:.80}",
            fix="pass a writer such as jl.writers.csv(path)",
        )


def _name_of_writer(writer: object) -> str:
    return name_of(writer).removesuffix("Description").lower()
