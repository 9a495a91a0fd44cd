"""A dry run: a few iterations of everything, without a trace outside.

    print(dry_run(loop, data))

Every attachment runs once at each of its events, whatever its filter says. Nothing is written
except to a temporary folder, and nothing is resumed.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from jaxloop._core.checks import as_number, check_count
from jaxloop._core.dry import DryRun
from jaxloop._core.events import Event, Status, StatusLike
from jaxloop._core.filters import ALWAYS, Filter, Firing, as_filter
from jaxloop._core.state import Snapshot, State
from jaxloop._core.tables import aligned
from jaxloop._core.types import DataLike
from jaxloop._engine.options import RunOptions
from jaxloop._engine.results import make_output
from jaxloop._engine.run import Run
from jaxloop._spec import Attachment, CheckpointTrigger, Handler, LoopSpec, Observer

_ENDS = (Event.EPOCH_HALTED, Event.HALTED)
"""The events that fire only if a handler halts the loop."""


@dataclasses.dataclass(frozen=True)
class DryRunReport:
    """The result of `Loop.dry_run`, which prints as a table.

    Attributes:
        attachments: What is attached: (kind, name, events, what the dry run did with it). The last
            is "ran", "did not run" or "left out".
        metrics: The scalar metrics at the end of the epoch.
        status: "completed", or "halted" if a handler halted the loop.
        halted_by: The name of that handler, or None.
        iterations: The number of iterations.
    """

    attachments: tuple[tuple[str, str, str, str], ...]
    metrics: Mapping[str, float]
    status: str
    halted_by: str | None
    iterations: int

    def __str__(self) -> str:
        rows = [("kind", "name", "events", "dry run"), *self.attachments]
        lines = aligned(rows)
        by = f" by {self.halted_by}" if self.halted_by else ""
        lines.append(f"{self.status}{by} after {self.iterations} iterations")
        numbers = [f"{name} {number:.4g}" for name, number in self.metrics.items()]
        return "\n".join([*lines, *(["metrics: " + ", ".join(numbers)] if numbers else [])])


def dry_run(
    loop: LoopSpec[Any, Any], data: DataLike, init_state: Any = None, *, iterations: int = 2
) -> DryRunReport:
    """Runs a few iterations and everything that is attached, to find mistakes before a long run.

    It starts fresh, so `resume` and `from_state` are ignored. It trains one epoch of ``iterations``
    batches and makes the output. The real run uses what is compiled here.

    Every handler and observer runs once at each of its events, as soon as the metrics that it
    watches exist. Its filter does not decide, but if that is a function, it is called. What runs
    only when the loop halts runs in a second, halted epoch. A validation evaluates ``iterations``
    batches. Checkpoints go to a temporary folder, which is deleted. Writers and alerts are left
    out. Your own handlers and observers run with all that they do, but their ``close`` does not.

    Args:
        loop: The loop.
        data: See `run`. A one-shot iterator loses the batches that are read.
        init_state: See `run`.
        iterations: The maximum number of batches of training and of each validation.

    Returns:
        A report that prints as a table.

    Raises:
        ArgumentError: ``iterations`` is less than 1.
        Exception: Whatever the run would raise.

    Example:
        >>> import jaxloop as jl
        >>> step = lambda batch, state: jl.emit(state + batch, x=batch)
        >>> loop = jl.loop(step).metric("x", per="batch").checkpoint("runs/a", filter=jl.every(50))
        >>> print(loop.dry_run([1.0, 3.0, 5.0], 0.0))
        kind        name        events           dry run
        checkpoint  checkpoint  epoch_completed  ran
        completed after 2 iterations
        metrics: x 2
    """
    check_count("iterations", iterations, at_least=1, where="dry_run")
    ran: set[tuple[int, Event]] = set()
    with tempfile.TemporaryDirectory(prefix="jaxloop-dry-run-") as folder:
        dry = DryRun(os.path.join(folder, "1"), iterations)
        spec = _rehearsing(loop, dry, ran)
        state = _run(spec, data, init_state, iterations)
        make_output(loop, state, None)
        halting = _only_for_halts(loop)
        if halting and state.status == "completed":
            dry = DryRun(os.path.join(folder, "2"), iterations)
            spec = _rehearsing(loop, dry, ran, halting)
            halt = Handler((Event.ITERATION_COMPLETED,), ALWAYS, "dry_run", _halt, adds=())
            _run(spec.replace(attachments=(*spec.attachments, halt)), data, init_state, 1)
    numbers = {name: as_number(value) for name, value in state.metrics.items()}
    return DryRunReport(
        tuple(
            (one.kind, one.name, ", ".join(one.events), _what_happened(one, index, ran, dry))
            for index, one in enumerate(loop.attachments)
        ),
        {name: number for name, number in numbers.items() if number is not None},
        state.status,
        state.halted_by,
        state.step,
    )


def _run(spec: LoopSpec, data: Any, init_state: Any, iterations: int) -> State:
    """Runs one epoch."""
    options = RunOptions.of({"epochs": 1, "iterations": iterations})
    return Run(spec, data, init_state, options).finish()


def _halt(state: State) -> tuple[StatusLike, State]:
    return Status.HALT_LOOP, state


def _in_dry_run(one: Attachment, dry: DryRun) -> Attachment | None:
    """Returns what takes the place of an attachment, or None if it is left out."""
    if one.in_dry_run is not None:
        return one.in_dry_run(one, dry)
    return None if isinstance(one, CheckpointTrigger) else one


def _rehearsing(
    loop: LoopSpec,
    dry: DryRun,
    ran: set[tuple[int, Event]],
    only: frozenset[int] | None = None,
) -> LoopSpec:
    """Returns the loop of a dry run.

    Args:
        loop: The user's loop.
        dry: What attachments need to know.
        ran: Gets the index of each attachment that runs, and the event.
        only: The indices of the attachments that may run. None means all.
    """
    attachments = []
    for index, one in enumerate(loop.attachments):
        taken = _in_dry_run(one, dry)
        if isinstance(taken, Observer):
            # What closes is the user's own object, which the real run needs open.
            taken = dataclasses.replace(taken, close=None)
        if taken is not None:
            once = _Once(index, one, ran, only is None or index in only)
            attachments.append(dataclasses.replace(taken, filter=as_filter(once)))
    return loop.replace(attachments=tuple(attachments), start=None, resume_path=None)


def _only_for_halts(loop: LoopSpec) -> frozenset[int]:
    """Returns the indices of the attachments that run only if the loop halts."""
    return frozenset(
        index for index, one in enumerate(loop.attachments) if set(one.events) <= set(_ENDS)
    )


def _what_happened(one: Attachment, index: int, ran: set[tuple[int, Event]], dry: DryRun) -> str:
    if any((index, event) in ran for event in one.events):
        return "ran"
    return "left out" if _in_dry_run(one, dry) is None else "did not run"


class _Once:
    """A filter that lets an attachment run once at each of its events.

    Args:
        index: Tells the attachment from others.
        one: The attachment.
        ran: Gets the index and the event.
        may_run: Whether it may run at all.
    """

    def __init__(
        self, index: int, one: Attachment, ran: set[tuple[int, Event]], may_run: bool
    ) -> None:
        self._index, self._filter, self._ran, self._may_run = index, one.filter, ran, may_run
        self._watches = one.watches if isinstance(one, Handler | CheckpointTrigger) else ()

    def __call__(self, view: Snapshot) -> bool:
        event = view.event
        assert event is not None
        if not self._may_run or (self._index, event) in self._ran:
            return False
        if any(name not in view.metrics for name in self._watches):
            return False  # the handler that adds it has not run yet
        _ask(self._filter, view, event)
        self._ran.add((self._index, event))
        return True


def _ask(filter: Filter, view: Snapshot, event: Event) -> None:
    """Calls the functions in a user's filter, so that their mistakes are found."""
    if filter.asks:
        filter.matches(Firing(*view.event_counts[event], 0.0, lambda: view))
