"""Evaluating a model on other data while it is trained.

    loop.metric("accuracy").validate(validation_data)     # adds validation_accuracy

The evaluation is a loop of its own with accumulators of its own: what is being accumulated in the
epoch that goes on is not touched. It is made once, so that every epoch runs the same executable.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxloop._core.events import Status, as_events
from jaxloop._core.filters import as_filter
from jaxloop._core.interrupts import Interrupted
from jaxloop._core.state import State
from jaxloop._loop import Loop
from jaxloop._program.cache import Programs
from jaxloop._spec import Attachment, EventLike, FilterLike
from jaxloop.errors import ArgumentError, ArgumentTypeError
from jaxloop.metrics import SKIPPED


@dataclasses.dataclass(frozen=True)
class _Validate:
    loop: Loop
    data: Any
    prefix: str

    def __call__(self, state: State) -> tuple[Status, State]:
        step_state = state.step_state
        if not isinstance(step_state, dict) or "model_state" not in step_state:
            raise ArgumentTypeError(
                "validate needs a step state that is a dict with 'model_state', and it is "
                f"{type(step_state).__name__}",
                fix="use jl.trainer, or keep the model's state under 'model_state'",
            )
        data = self.data
        if callable(data) and not hasattr(data, "__iter__"):
            data = data(state.epoch)
        result: State = self.loop.run(data, {"model_state": step_state["model_state"]})
        if result.status == "interrupted":
            raise Interrupted(result.halted_by)
        values = {f"{self.prefix}{name}": value for name, value in result.history[0].items()}
        return Status.CONTINUE, state.replace(metrics={**state.metrics, **values})


def attach_validate(
    loop: Loop, data: Any, model: Any, event: EventLike, filter: FilterLike, prefix: str
) -> Loop:
    """See `Loop.validate`."""
    if hasattr(data, "__next__"):
        raise ArgumentTypeError(
            "validate: data is a one-shot iterator, which the first validation would use up",
            fix="pass a re-iterable (a list, jl.batches) or a function epoch -> iterable",
        )
    supervised = loop.supervised
    if supervised is None:
        if model is None:
            raise ArgumentError(
                "validate: this loop has no model of its own",
                fix="pass model=, or make the loop with jl.trainer",
            )
        # Imported here, so that `import jaxloop` does not import Optax.
        from jaxloop._supervised.task import SupervisedTask

        supervised = SupervisedTask(model)
    metrics = tuple(one for one in loop.metrics if one.name != SKIPPED)
    if not metrics:
        raise ArgumentError(
            "validate: no metric was attached before it, and there is nothing to evaluate",
            fix="call .metric(...) before .validate(...)",
        )
    _, step_fn = supervised.eval_steps(model)
    inner = Loop(step_fn, metrics=metrics, _programs=Programs())
    names = tuple(f"{prefix}{one.name}" for one in metrics)
    return loop.attach(
        Attachment(
            as_events(event),
            _Validate(inner, data, prefix),
            as_filter(filter),
            "validate" if prefix == "validation_" else f"validate_{prefix}",
            adds=names,
        )
    )
