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
from collections.abc import Iterator, Mapping
from typing import Any, Final

from jaxloop._core.batch import as_batch
from jaxloop._core.checks import check_callable, check_string
from jaxloop._core.dry import DryRun
from jaxloop._core.events import Event, EventLike, Status, StatusLike, as_events
from jaxloop._core.filters import Filter, FilterLike, Firing, as_filter
from jaxloop._core.state import State, make
from jaxloop._core.types import Better, DataLike
from jaxloop._engine.evaluating import evaluate
from jaxloop._spec import Handler, HandlerFn, HandlerResult, LoopSpec, RunStart, SpecT, Task
from jaxloop.errors import ArgumentError, ArgumentTypeError, DataError, JaxloopError
from jaxloop.handlers.evaluation import EvalStepFn, Evaluation, StepTask, no_metrics, own_metrics
from jaxloop.handlers.first_batch import END, first_batch, same_random_numbers
from jaxloop.metrics.declare import MetricLike

_LOOK_AHEAD: Final = 100_000
"""How many epochs ahead the first validation is searched for."""


def validate(
    loop: SpecT,
    data: DataLike,
    *,
    model: Any = None,
    eval_step: EvalStepFn | None = None,
    metrics: Mapping[str, MetricLike] | None = None,
    event: EventLike = "epoch_completed",
    filter: FilterLike = "always",
    prefix: str = "validation_",
) -> SpecT:
    """Evaluates metrics on ``data`` during the training, and adds them to ``state.metrics``.

    By default, these are all metrics of the loop, also those that you attach after this call. Only
    metrics of what an evaluation does not report, such as "gradient_norm", are left out. The values
    exist from then on to the end of the epoch. Before the first step, `run` reads one batch of
    ``data`` and checks the evaluation on it. If the first epoch is validated, the validation
    continues from this batch. Otherwise the batch is read again later.

    Args:
        loop: The loop.
        data: A re-iterable of batches, or a function ``epoch -> iterable``. The check calls the
            function with the epoch of the first validation. A model takes supervised batches.
        model: The model. Defaults to the trainer's.
        eval_step: Evaluates one batch instead of a model, for any loop: ``eval_step(batch,
            step_state)`` gets the whole step state, and returns a dict of what the metrics read, or
            ``jl.emit(step_state, name=value)``, whose state is ignored. It is compiled.
        metrics: Metrics by name to evaluate instead of those of the loop; see `metric`.
        event: See `handle`.
        filter: See `handle`.
        prefix: The prefix of the metrics' names.

    Returns:
        A new loop with the validation.

    Raises:
        ArgumentError: The loop has no model and there is no ``eval_step``, there is a model as well
            as an ``eval_step``, ``metrics`` or ``prefix`` is empty, or another validation on other
            data has the same prefix. Raised by `run` if there is no metric, or if a name with the
            prefix is the name of a metric of the loop.
        ArgumentTypeError: ``data`` is a one-shot iterator or not iterable, ``eval_step`` is not a
            function, ``metrics`` is not a dict of metrics, or ``prefix`` is not a string. Raised by
            `run` if the step state has no model, or ``eval_step`` returns something else.
        UnknownNameError: ``metrics`` has an unknown metric. Raised by `run` if ``eval_step`` does
            not report what a metric reads.
        DataError: Raised by `run` if ``data`` is empty, or its batches do not suit the model.
        ShapeError: Raised by `run` if the model, the loss and the metrics do not fit a batch.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxloop as jl
        >>> error = lambda batch, w: {"error": jnp.abs(batch - w)}
        >>> loop = jl.loop(lambda batch, w: w + 0.5 * (jnp.mean(batch) - w))
        >>> loop = loop.validate([jnp.ones(4)], eval_step=error, metrics={"error": "error"})
        >>> state = loop.run([jnp.ones(2)], init_state=0.0, epochs=2)
        >>> [float(state.history[epoch]["validation_error"]) for epoch in (0, 1)]
        [0.5, 0.25]
    """
    _check_data(data)
    _check_prefix(loop, prefix, data)
    task = _task_of(loop, model, eval_step)
    name = "validate" if prefix == "validation_" else f"validate_{prefix}"
    evaluation = Evaluation(task, model, own_metrics(metrics))
    validation = _Validation(name, evaluation, data, prefix, as_events(event), as_filter(filter))
    return loop.attach(validation.attachment())


def _task_of(loop: LoopSpec, model: Any, eval_step: EvalStepFn | None) -> Task:
    if eval_step is not None:
        check_callable("validate", "eval_step", eval_step)
        return StepTask(eval_step)
    if loop.task is not None:
        return loop.task
    if model is None:
        raise ArgumentError(
            "validate: this loop has no model to evaluate, and there is no eval_step",
            fix="pass eval_step=, pass model=, or make the loop with jl.trainer",
        )
    # Imported here, because it imports Optax, which `import jaxloop` does not.
    from jaxloop._supervised.steps import make_evaluation

    return make_evaluation(model).task


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
    check_string("validate", "prefix", prefix, fix="pass a prefix such as 'validation_'")
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
        evaluation: What it evaluates.
        data: The validation data.
        prefix: The prefix of the metrics' names.
        events: When it runs.
        filter: When it runs.
        iterations: The maximum number of batches that it evaluates, or None for all.
    """

    name: str
    evaluation: Evaluation
    data: Any
    prefix: str
    events: tuple[Event, ...]
    filter: Filter
    iterations: int | None = None

    def attachment(self) -> Handler:
        """Returns the handler that runs it."""
        return Handler(
            self.events,
            self.filter,
            self.name,
            self,
            adds=self.added,
            check=self.check,
            open=self.open,
            validates=True,
            in_dry_run=self.shortened,
        )

    def shortened(self, handler: Handler, dry: DryRun) -> Handler:
        """Returns what takes the place of its handler in a dry run."""
        return dataclasses.replace(self, iterations=dry.iterations).attachment()

    def added(self, loop: LoopSpec) -> dict[str, Better | None] | None:
        """Returns the metrics that it adds, and which of their values are better."""
        found = self.evaluation.added(loop)
        if found is None:
            return None
        return {f"{self.prefix}{name}": better for name, better in found.items()}

    @property
    def is_function(self) -> bool:
        """Whether the data are a function of the epoch."""
        return callable(self.data) and not hasattr(self.data, "__iter__")

    def __call__(self, state: State[Any]) -> HandlerResult[Any]:
        """Does nothing: `open` makes the function of each run, which knows the loop."""
        return None

    def data_of(self, epoch: int) -> Any:
        """Returns the data of one epoch."""
        if not self.is_function:
            return self.data
        with self._in_validation():
            return self.data(epoch)

    def evaluate(
        self, spec: LoopSpec, state: State[Any], data: Any
    ) -> tuple[StatusLike, State[Any]]:
        """Adds the metrics that ``spec`` evaluates on ``data`` to the state of a run."""
        with self._in_validation():
            # Not `state.step_state`, which would mark the arrays as read, so that the next block
            # gets copies. They are not needed any more when the values are known.
            step_state = self.evaluation.eval_state(state.loan.step_state)
            found = evaluate(spec, data, step_state, self.iterations)
        values = {f"{self.prefix}{name}": value for name, value in found.items()}
        # Not `state.replace`, which would read the metrics of the epoch and wait for the device.
        metrics = state.lazy_metrics.adding(values)
        return Status.CONTINUE, make(State, {**state.__dict__, "lazy_metrics": metrics})

    # --- before the first step -----------------------------------------------------------------

    def check(self, loop: LoopSpec) -> None:
        """Checks that there are metrics, and their names."""
        if not self.evaluation.declared(loop):
            with self._in_validation():
                raise no_metrics("the loop has none")
        taken = sorted({one.name for one in loop.metrics} & set(self.added(loop) or ()))
        if taken:
            raise ArgumentError(
                f"{self.name} adds {', '.join(taken)}, which the loop has as a metric already",
                fix="pass another prefix= to validate, or another name to the metric",
            )

    def open(self, start: RunStart) -> HandlerFn:
        """Checks the evaluation on the first batch, and returns the handler of one run."""
        data = self._checked_data(start)
        return _OneRun(self, self.evaluation.of(start.loop), data)

    def _checked_data(self, start: RunStart) -> Any:
        """Returns the data of this epoch, if they were opened to check them, or None."""
        with self._in_validation():
            step_state = self.evaluation.state_shapes(start.step_state)
        now, first_epoch = start.snapshot.epoch, self._first_epoch(start)
        if self.is_function and self._counts_epochs and first_epoch is None:
            return None  # no epoch is validated, and the function may have no data for the others
        # If this epoch is validated, no other data are opened before these, so they can be kept.
        keeps = first_epoch == now
        with contextlib.nullcontext() if keeps else same_random_numbers():
            data = self.data_of(now if first_epoch is None else first_epoch)
            with self._in_validation():
                if data is start.data and start.sample is not None:
                    # A second iterator over the same object could disturb the one that trains.
                    batch = start.sample
                else:
                    batch, data = first_batch(data)
        if batch is END and self.is_function and not self._counts_epochs:
            return None  # the epoch is a guess, and the function may have no data for it
        with self._in_validation():
            if batch is END:
                raise DataError(
                    "data must have at least one batch, got empty data",
                    fix="pass at least one batch",
                )
            first = as_batch(batch, "the first batch of the data")
            self.evaluation.trace(start.loop, data, first, step_state)
        return data if keeps else None

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
        spec: The loop that evaluates.
        data: The data of the epoch in which the run starts, or None if they are not open.
    """

    def __init__(self, validation: _Validation, spec: LoopSpec, data: Any) -> None:
        self._validation, self._spec, self._opened = validation, spec, data

    def __call__(self, state: State[Any]) -> tuple[StatusLike, State[Any]]:
        opened, self._opened = self._opened, None
        data = self._validation.data_of(state.epoch) if opened is None else opened
        return self._validation.evaluate(self._spec, state, data)
