"""The evaluation of a model on other data during training.

    loop = validate(metric(loop, "accuracy"), validation_data)     # adds validation_accuracy

The evaluation is a loop with its own accumulators, so it does not affect the metrics of the epoch.
It is made once, so every epoch runs the same executable.

Before the first step, a run reads one batch of the validation data, and traces the evaluation on
it without compiling. If the first epoch is validated, that validation continues from this batch.
Otherwise the batch is dropped, because an iterator that stays open for many epochs may hold on to
worker processes. The random numbers of the run are the same in both cases as without the check.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import sys
from collections.abc import Iterator
from typing import Any, Final

import jax
import numpy as np

from jaxloop._core.batch import as_batch
from jaxloop._core.events import Event, EventLike, Status, StatusLike, as_events
from jaxloop._core.filters import Filter, FilterLike, Firing, as_filter
from jaxloop._core.interrupts import Interrupted
from jaxloop._core.state import State
from jaxloop._core.types import Better, DataLike, PyTree
from jaxloop._data.in_memory import Batches
from jaxloop._engine.run import run
from jaxloop._spec import Handler, HandlerFn, LoopSpec, RunStart, SpecT, Task
from jaxloop.errors import ArgumentError, ArgumentTypeError, DataError, JaxloopError
from jaxloop.metrics import SKIPPED
from jaxloop.metrics.names import better_of

_END: Final = object()
_LOOK_AHEAD: Final = 100_000
"""How many epochs ahead the first validation is searched for."""


def validate(
    loop: SpecT,
    data: DataLike,
    *,
    model: Any = None,
    event: EventLike = "epoch_completed",
    filter: FilterLike = "always",
    prefix: str = "validation_",
) -> SpecT:
    """Evaluates the metrics attached so far on ``data``, and adds them to ``state.metrics``.

    The values exist from then on to the end of the epoch. Before the first step, `run` reads one
    batch of ``data`` and checks the model and the metrics on it. If the first epoch is validated,
    the validation continues from this batch. Otherwise the batch is read again later.

    Args:
        loop: The loop.
        data: A re-iterable of supervised batches, or a function ``epoch -> iterable``. The check
            calls the function with the epoch of the first validation.
        model: The model. Defaults to the trainer's.
        event: See `handle`.
        filter: See `handle`.
        prefix: The prefix of the metrics' names.

    Returns:
        A new loop with the validation.

    Raises:
        ArgumentError: The loop has no model or no metric, ``prefix`` is empty, or another
            validation on other data has the same prefix. Raised by `run` if a name with the prefix
            is the name of a metric of the loop.
        ArgumentTypeError: ``data`` is a one-shot iterator or not iterable, or ``prefix`` is not a
            string. Raised by `run` if the step state has no model.
        DataError: Raised by `run` if ``data`` is empty, or its batches are not supervised batches.
        ShapeError: Raised by `run` if the model, the loss and the metrics do not fit a batch.
    """
    _check_data(data)
    _check_prefix(loop, prefix, data)
    task = loop.task
    if task is None:
        if model is None:
            raise ArgumentError(
                "validate: this loop has no model",
                fix="pass model=, or make the loop with jl.trainer",
            )
        # Imported here, because it imports Optax, which `import jaxloop` does not.
        from jaxloop._supervised.steps import make_evaluation

        task = make_evaluation(model).task
    metrics = tuple(one for one in loop.metrics if one.name != SKIPPED)
    if not metrics:
        raise ArgumentError(
            "validate: no metric is attached, so there is nothing to evaluate",
            fix="call .metric(...) before .validate(...)",
        )
    _, step_fn = task.eval_steps(model)
    evaluation: LoopSpec = LoopSpec(step_fn, metrics=metrics)
    name = "validate" if prefix == "validation_" else f"validate_{prefix}"
    validation = _Validation(
        name, task, evaluation, data, prefix, as_events(event), as_filter(filter)
    )
    return loop.attach(
        Handler(
            validation.events,
            validation.filter,
            name,
            validation,
            adds=validation.added,
            check=validation.check,
            open=validation.open,
        )
    )


def _check_data(data: object) -> None:
    if hasattr(data, "__next__"):
        raise ArgumentTypeError(
            "validate: data must be re-iterable, got a one-shot iterator, which the first "
            "validation would use up",
            fix="pass a re-iterable (a list, jl.batches) or a function epoch -> iterable",
        )
    if isinstance(data, str | bytes) or not (hasattr(data, "__iter__") or callable(data)):
        raise ArgumentTypeError(
            "validate: data must be a re-iterable of batches or a function epoch -> iterable, got "
            f"{type(data).__name__}",
            fix="pass batches; for arrays in memory, use jl.batches((x, y), batch_size)",
        )


def _check_prefix(loop: LoopSpec, prefix: object, data: object) -> None:
    if not isinstance(prefix, str):
        raise ArgumentTypeError(
            f"validate: prefix must be a string, got {prefix!r}",
            fix="pass a prefix such as 'validation_'",
        )
    if not prefix:
        raise ArgumentError(
            "validate: prefix must not be empty, because the values would replace the metrics of "
            "the epoch",
            fix="pass a prefix such as 'validation_'",
        )
    for one in loop.attachments:
        other = one.fn if isinstance(one, Handler) else None
        if isinstance(other, _Validation) and other.prefix == prefix and other.data is not data:
            raise ArgumentError(
                f"validate: two validations on different data have the prefix {prefix!r}, and one "
                "would replace the values of the other",
                fix="pass another prefix= to one of them",
            )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Validation:
    """A validation, and its check. See `validate`.

    Attributes:
        name: The handler's name.
        task: The way to evaluate the model.
        evaluation: The loop that evaluates the model.
        data: The validation data.
        prefix: The prefix of the metrics' names.
        events: When it runs.
        filter: When it runs.
    """

    name: str
    task: Task
    evaluation: LoopSpec
    data: Any
    prefix: str
    events: tuple[Event, ...]
    filter: Filter

    def added(self, loop: LoopSpec) -> dict[str, Better | None]:
        """Returns the names of the metrics that it adds, and which of their values are better."""
        return {f"{self.prefix}{one.name}": better_of(one) for one in self.evaluation.metrics}

    @property
    def is_function(self) -> bool:
        """Whether the data are a function of the epoch."""
        return callable(self.data) and not hasattr(self.data, "__iter__")

    def __call__(self, state: State[Any]) -> tuple[StatusLike, State[Any]]:
        return self.evaluate(state, self.data_of(state.epoch))

    def data_of(self, epoch: int) -> Any:
        """Returns the data of one epoch."""
        if not self.is_function:
            return self.data
        with self._in_validation():
            return self.data(epoch)

    def evaluate(self, state: State[Any], data: Any) -> tuple[StatusLike, State[Any]]:
        """Adds the metrics of ``data`` to the state."""
        with self._in_validation():
            result = run(self.evaluation, data, self.task.eval_state(state.step_state))
        if result.status == "interrupted":
            raise Interrupted(result.halted_by)
        values = {f"{self.prefix}{name}": value for name, value in result.history[0].items()}
        return Status.CONTINUE, state.replace(metrics={**state.metrics, **values})

    # --- before the first step -----------------------------------------------------------------

    def check(self, loop: LoopSpec) -> None:
        """Checks the names of the metrics."""
        taken = sorted({one.name for one in loop.metrics} & set(self.added(loop)))
        if taken:
            raise ArgumentError(
                f"{self.name} adds {', '.join(taken)}, which the loop has as a metric already",
                fix="pass another prefix= to validate, or another name to the metric",
            )

    def open(self, start: RunStart) -> HandlerFn:
        """Checks the evaluation on the first batch, and returns the handler of one run."""
        with self._in_validation():
            step_state = jax.eval_shape(self.task.eval_state, start.step_state)
        now, first_epoch = start.snapshot.epoch, self._first_epoch(start)
        if self.is_function and self._counts_epochs and first_epoch is None:
            return self  # no epoch is validated, and the function may have no data for the others
        # If this epoch is validated, no other data are opened before these, so they can be kept.
        keeps = first_epoch == now
        with contextlib.nullcontext() if keeps else _same_random_numbers():
            data = self.data_of(now if first_epoch is None else first_epoch)
            with self._in_validation():
                if data is start.data and start.sample is not None:
                    # A second iterator over the same object could disturb the one that trains.
                    batch = start.sample
                else:
                    batch, data = _first_batch(data)
        if batch is _END and self.is_function and not self._counts_epochs:
            return self  # the epoch is a guess, and the function may have no data for it
        with self._in_validation():
            if batch is _END:
                raise DataError(
                    "data must have at least one batch, got empty data",
                    fix="pass at least one batch",
                )
            # The first evaluation uses what is traced here.
            self.evaluation.programs.specialize(
                self.evaluation.step_fn,
                self.evaluation.metrics,
                as_batch(batch, "the first batch of the data"),
                step_state,
                fuse="auto",
                options={},
            )
        return _OneRun(self, data) if keeps else self

    @property
    def _counts_epochs(self) -> bool:
        """Whether the epochs that are validated follow from the counts of epochs."""
        filter = self.filter
        return self.events == (Event.EPOCH_COMPLETED,) and not (filter.asks or filter.timed)

    def _first_epoch(self, start: RunStart) -> int | None:
        """Returns the first epoch that is validated, or None if there is none or it is unknown."""
        snapshot = start.snapshot
        epoch, (total, _) = snapshot.epoch, snapshot.event_counts[Event.EPOCH_COMPLETED]
        # Each epoch has at least one step.
        most = _LOOK_AHEAD if snapshot.max_step is None else snapshot.max_step - snapshot.step
        if snapshot.max_epoch is not None:
            most = snapshot.max_epoch - epoch
        if self._counts_epochs:
            for ahead in range(min(most, _LOOK_AHEAD)):
                if self.filter.matches(Firing(total + ahead + 1, 1)):
                    return epoch + ahead
        return None

    @contextlib.contextmanager
    def _in_validation(self) -> Iterator[None]:
        """Says in an error that it comes from this validation."""
        try:
            yield
        except Exception as error:
            where = "validation" if self.prefix == "validation_" else f"validation {self.prefix!r}"
            notes = getattr(error, "__notes__", [])
            # The notes of the run that evaluates would read as those of the run that trains.
            notes[:] = [note.replace("jaxloop: ", f"jaxloop: {where}: ", 1) for note in notes]
            if isinstance(error, JaxloopError):
                error.args = (f"{where}: {str(error).removeprefix('run: ')}",)
            else:
                error.add_note(f"jaxloop: in the {where}")
            raise


class _OneRun:
    """A validation in one run. Its first evaluation reads the data that the check opened.

    Args:
        validation: The validation.
        data: The data of the epoch in which the run starts.
    """

    def __init__(self, validation: _Validation, data: Any) -> None:
        self._validation, self._opened = validation, data

    def __call__(self, state: State[Any]) -> tuple[StatusLike, State[Any]]:
        opened, self._opened = self._opened, None
        data = self._validation.data_of(state.epoch) if opened is None else opened
        return self._validation.evaluate(state, data)


class _Continued:
    """An iterator as an iterable, with the first item that was read from it."""

    def __init__(self, first: PyTree, iterator: Iterator[PyTree]) -> None:
        self._items = itertools.chain([first], iterator)

    def __iter__(self) -> Iterator[PyTree]:
        return self._items


def _first_batch(data: Any) -> tuple[PyTree, Any]:
    """Returns the first batch of the data, or `_END`, and the data from that batch on."""
    if isinstance(data, Batches):
        return next(data.epoch(0), _END), data
    if isinstance(data, list | tuple):
        return data[0] if data else _END, data
    if isinstance(data, str | bytes) or not hasattr(data, "__iter__"):
        raise ArgumentTypeError(
            "the function epoch -> iterable must return an iterable of batches, got "
            f"{type(data).__name__}",
            fix="return batches, such as jl.batches((x, y), batch_size)",
        )
    iterator = iter(data)
    first = next(iterator, _END)
    return first, _Continued(first, iterator)


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Restores the global random generators, which many data loaders draw from when opened."""
    python, numpy, torch = random.getstate(), np.random.get_state(), sys.modules.get("torch")
    of_torch = None if torch is None else torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch is not None:
            torch.set_rng_state(of_torch)
