"""What a writer is, and what it is told about a run.

    class Printer:
        def write(self, step, values):
            print(step, values)

        def close(self):
            print("the end")

    loop = loop.write(Printer())

A writer needs only these two methods. All methods of a writer are called by one thread, in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from jaxloop.writers._values import Value


@dataclasses.dataclass(frozen=True)
class WriterStart:
    """What a writer is told right before the first step of a run.

    Attributes:
        step: The step from which the run resumes, or 0 for a fresh run. What was written up to this
            step stays. What was written after it must go, because it is written again. If the
            checkpoint lies between the last iteration of an epoch and the end of the epoch, values
            that were written for this very step may come again. They are the same.
        run_id: A text that is the same for a run and for what resumes it.
        metrics: The names of the loop's metrics that are single numbers, in order. Handlers may add
            others later.
        hyperparameters: What was passed to `write`.
        branches: Whether the run starts from a `State` (``from_state``). It then is a run of its
            own, and what another run has written after ``step`` must be kept.
    """

    step: int
    run_id: str
    metrics: tuple[str, ...] = ()
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    branches: bool = False


@runtime_checkable
class Writer(Protocol):
    """A writer of one run. These two methods are all that it needs."""

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Writes the values of a step.

        Args:
            step: The number of iterations completed so far. It never decreases. It may come twice
                at the end of an epoch. The values of the second call have other names.
            values: ``{name: value}``. Numbers are Python numbers, arrays are NumPy arrays, and
                images, texts and histograms are `Image`, `Text` and `Histogram`.
        """

    def close(self) -> None:
        """Ends the writing. It is called once, with or without an error."""


@runtime_checkable
class FlushingWriter(Protocol):
    """A writer that keeps something in memory."""

    def flush(self) -> None:
        """Makes durable what was written. It is called before each checkpoint is written."""


@runtime_checkable
class FailingWriter(Protocol):
    """A writer that marks runs that failed."""

    def fail(self, error: BaseException) -> None:
        """Is called before `close` when an exception ends the run."""


@runtime_checkable
class PlacedWriter(Protocol):
    """A writer, or the description of one, that says where it writes to."""

    @property
    def where(self) -> str:
        """The path or the address, which the summary of a run shows."""


@runtime_checkable
class WriterDescription(Protocol):
    """A description of a writer, from which each run opens its own, such as ``csv(path)``."""

    def open(self, start: WriterStart) -> Writer:
        """Opens the writer of one run, and raises if it finds a mistake."""


WriterLike: TypeAlias = Writer | WriterDescription
"""A writer, or the description of one."""
