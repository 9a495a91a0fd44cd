"""What a validation evaluates: a step, and the metrics of the loop that trains, or its own.

    evaluation = Evaluation(StepTask(eval_step), model=None, metrics=None)
    spec = evaluation.of(loop)          # the loop that evaluates, made once per set of metrics
    names = evaluation.added(loop)      # {"accuracy": None}

Invariant: the metrics are read from the loop when a run starts, so the order in which metrics and
validations are attached does not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, TypeAlias

import jax

from jaxloop._core.arrays import abstract, state_signature
from jaxloop._core.batch import Batch, Signature
from jaxloop._core.checks import in_words
from jaxloop._core.step_result import Emission
from jaxloop._core.types import BatchFn, Better, PyTree
from jaxloop._spec import LoopSpec, Task
from jaxloop.errors import ArgumentError, ArgumentTypeError, UnknownNameError, first_line
from jaxloop.metrics import SKIPPED
from jaxloop.metrics.declare import (
    EachScalar,
    MetricLike,
    MetricSpec,
    declare,
    of_training_loss,
)
from jaxloop.metrics.names import better_by_name, not_reading

EvalStepFn: TypeAlias = Callable[[PyTree, Any], Mapping[str, PyTree] | Emission[Any]]
"""``(batch, step_state)`` -> what the metrics of an evaluation read, by name."""


@dataclasses.dataclass(frozen=True)
class StepTask:
    """The way to evaluate a loop with a function of a batch and the whole step state.

    Attributes:
        eval_step: Returns a dict, or an `Emission` whose state is ignored.
    """

    eval_step: EvalStepFn

    training_only: ClassVar[tuple[str, ...]] = ()
    """See `Task`."""
    trains: ClassVar[bool] = False
    """See `Task`."""
    learning_rate: ClassVar[float | None] = None
    """See `Task`."""

    @property
    def loss(self) -> None:
        """None, because the function computes what it reports."""

    def statics(self) -> Mapping[str, str]:
        """See `Task`."""
        return {}

    def check_data(self, data: Any, reported: Collection[str]) -> None:
        """See `Task`. The function knows its data."""

    def eval_state(self, step_state: PyTree) -> PyTree:
        """See `Task`."""
        return step_state

    def eval_steps(self, model: Any) -> tuple[BatchFn, BatchFn]:
        """See `Task`."""
        if model is not None:
            raise ArgumentError(
                "validate: model= must not be given together with an eval_step, which evaluates a "
                "model of its own",
                fix="leave out model=, or call the model in eval_step",
            )

        def init_fn(batch: PyTree, step_state: PyTree) -> PyTree:
            return step_state

        def step_fn(batch: PyTree, step_state: PyTree) -> Emission[Any]:
            result = self.eval_step(batch, step_state)
            outputs = result.outputs if isinstance(result, Emission) else result
            if not isinstance(outputs, Mapping):
                raise ArgumentTypeError(
                    "eval_step must return a dict of values by name, or jl.emit(step_state, "
                    f"name=value), got {in_words(result)}",
                    fix="return a dict, such as {'y_true': y, 'y_pred': logits}",
                )
            return Emission(step_state, dict(outputs))

        return init_fn, step_fn


def own_metrics(metrics: Mapping[str, MetricLike] | None) -> tuple[MetricSpec, ...] | None:
    """Returns the metrics that a validation has instead of those of the loop, or None.

    Raises:
        ArgumentTypeError: They are not a dict of metrics by name.
        ArgumentError: There are none.
    """
    if metrics is None:
        return None
    if not isinstance(metrics, Mapping):
        raise ArgumentTypeError(
            f"validate: metrics must be a dict of metrics by name, got {in_words(metrics)}",
            fix="pass a dict such as {'accuracy': 'accuracy'}",
        )
    if not metrics:
        raise ArgumentError(
            "validate: metrics must have at least one metric, got an empty dict",
            fix="leave out metrics= to evaluate the metrics of the loop",
        )
    return tuple(declare(metric, name) for name, metric in metrics.items())


class Evaluation:
    """A step that evaluates, and the metrics that it evaluates.

    Args:
        task: The way to evaluate.
        model: The model to evaluate instead of the task's own, or None.
        metrics: The metrics, or None for those of the loop.
    """

    def __init__(self, task: Task, model: Any, metrics: tuple[MetricSpec, ...] | None) -> None:
        if metrics is not None and task.loss is not None:
            metrics = tuple(map(of_training_loss, metrics))
        self._task, self._metrics = task, metrics
        _, self._step_fn = task.eval_steps(model)
        self._loops: dict[tuple[MetricSpec, ...], LoopSpec] = {}
        self._states: dict[Signature, PyTree] = {}
        self._names: dict[tuple[MetricSpec, ...], tuple[str, ...]] = {}

    @property
    def eval_state(self) -> Callable[[PyTree], PyTree]:
        """Makes the step state of the evaluation from that of the training."""
        return self._task.eval_state

    def state_shapes(self, step_state: PyTree) -> PyTree:
        """Returns the shapes of the step state of the evaluation, given those of the training's."""
        key = state_signature(step_state)
        if key not in self._states:
            self._states[key] = jax.eval_shape(self._task.eval_state, step_state)
        return self._states[key]

    def declared(self, loop: LoopSpec) -> tuple[MetricSpec, ...]:
        """Returns the metrics to evaluate in a run of ``loop``."""
        if self._metrics is not None:
            return self._metrics
        return not_reading(loop.metrics, {SKIPPED, *self._task.training_only})

    def added(self, loop: LoopSpec) -> Mapping[str, Better | None] | None:
        """Returns the metrics that it evaluates, and which of their values are better.

        None means that their names depend on what the step reports, which is not known yet.
        """
        declared = self.declared(loop)
        names = self._names.get(declared)
        if names is None and any(isinstance(one.metric, EachScalar) for one in declared):
            return None
        return better_by_name(declared, names)

    def of(self, loop: LoopSpec) -> LoopSpec:
        """Returns the loop that evaluates the metrics of ``loop``.

        It is made once for each set of metrics, so all runs share its compiled programs.
        """
        declared = self.declared(loop)
        if declared not in self._loops:
            self._loops[declared] = LoopSpec(self._step_fn, metrics=declared)
        return self._loops[declared]

    def trace(self, loop: LoopSpec, data: Any, batch: Batch, step_state: PyTree) -> None:
        """Traces the evaluation, which raises its errors. The first evaluation uses the trace.

        Args:
            loop: The loop that trains.
            data: The data of the evaluation.
            batch: Its first batch.
            step_state: The step state of the evaluation, or its shapes.

        Raises:
            DataError: The data have padding that the step does not weight.
            UnknownNameError: A metric needs a value that the step does not report.
            ArgumentError: There is no metric.
            ShapeError: The shapes do not fit.
        """
        evaluating = self.of(loop)
        try:
            program = evaluating.programs.specialize(
                self._step_fn, evaluating.metrics, batch, step_state, fuse="auto", options={}
            )
        except UnknownNameError as error:
            if not isinstance(self._task, StepTask):
                raise
            raise self._reports_too_little(error, batch, step_state) from error
        self._task.check_data(data, program.reported)
        if not program.metrics.names:
            raise no_metrics(f"none of {', '.join(program.reported) or 'nothing'} is a scalar")
        self._names[evaluating.metrics] = program.metrics.names

    def _reports_too_little(
        self, error: UnknownNameError, batch: Batch, step_state: PyTree
    ) -> UnknownNameError:
        emission = jax.eval_shape(self._step_fn, abstract(batch.value), step_state)
        reported = ", ".join(sorted(map(str, emission.outputs))) or "nothing"
        return UnknownNameError(
            f"{first_line(error)} (eval_step reports {reported})",
            fix="report it in eval_step, or pass metrics= to validate to evaluate other metrics",
        )


def no_metrics(why: str) -> ArgumentError:
    """Returns the error for a validation without a metric."""
    return ArgumentError(
        f"there must be a metric to evaluate, got none: {why}",
        fix="call .metric(...), before or after .validate(...), or pass metrics= to validate",
    )
