"""The evaluation of a model on other data during training.

    loop = validate(metric(loop, "accuracy"), validation_data)     # adds validation_accuracy

The evaluation is a loop with its own accumulators, so it does not affect the metrics of the epoch.
It is made once, so every epoch runs the same executable.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxloop._core.events import EventLike, Status, StatusLike, as_events
from jaxloop._core.filters import FilterLike, as_filter
from jaxloop._core.interrupts import Interrupted
from jaxloop._core.state import State
from jaxloop._core.types import DataLike
from jaxloop._engine.run import run
from jaxloop._spec import Handler, LoopSpec, SpecT
from jaxloop.errors import ArgumentError, ArgumentTypeError
from jaxloop.metrics import SKIPPED


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

    Args:
        loop: The loop.
        data: A re-iterable of supervised batches, or a function ``epoch -> iterable``.
        model: The model. Defaults to the trainer's.
        event: See `handle`.
        filter: See `handle`.
        prefix: The prefix of the metrics' names.

    Returns:
        A new loop with the validation.

    Raises:
        ArgumentError: The loop has no model, or no metric.
        ArgumentTypeError: ``data`` is a one-shot iterator.
    """
    if hasattr(data, "__next__"):
        raise ArgumentTypeError(
            "validate: data must be re-iterable, got a one-shot iterator, which the first "
            "validation would use up",
            fix="pass a re-iterable (a list, jl.batches) or a function epoch -> iterable",
        )
    task = loop.task
    if task is None:
        if model is None:
            raise ArgumentError(
                "validate: this loop has no model",
                fix="pass model=, or make the loop with jl.trainer",
            )
        # Imported here, because it imports Optax, which `import jaxloop` does not.
        from jaxloop._supervised.task import SupervisedTask

        task = SupervisedTask(model)
    metrics = tuple(one for one in loop.metrics if one.name != SKIPPED)
    if not metrics:
        raise ArgumentError(
            "validate: no metric is attached, so there is nothing to evaluate",
            fix="call .metric(...) before .validate(...)",
        )
    _, step_fn = task.eval_steps(model)
    evaluation: LoopSpec = LoopSpec(step_fn, metrics=metrics)
    return loop.attach(
        Handler(
            as_events(event),
            as_filter(filter),
            "validate" if prefix == "validation_" else f"validate_{prefix}",
            _Validate(evaluation, data, prefix),
            adds=tuple(f"{prefix}{one.name}" for one in metrics),
        )
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Validate:
    evaluation: LoopSpec
    data: Any
    prefix: str

    def __call__(self, state: State[Any]) -> tuple[StatusLike, State[Any]]:
        step_state = state.step_state
        if not isinstance(step_state, dict) or "model_state" not in step_state:
            raise ArgumentTypeError(
                "validate: the step state must be a dict with 'model_state', got "
                f"{type(step_state).__name__}",
                fix="use jl.trainer, or keep the model's state under 'model_state'",
            )
        data = self.data
        if callable(data) and not hasattr(data, "__iter__"):
            data = data(state.epoch)
        result = run(self.evaluation, data, {"model_state": step_state["model_state"]})
        if result.status == "interrupted":
            raise Interrupted(result.halted_by)
        values = {f"{self.prefix}{name}": value for name, value in result.history[0].items()}
        return Status.CONTINUE, state.replace(metrics={**state.metrics, **values})
