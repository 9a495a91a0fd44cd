"""The model and the loss of a supervised loop, for the handlers that evaluate its model.

    task = SupervisedTask(model, "mean_squared_error")
    init_fn, step_fn = task.eval_steps()

Invariant: an evaluation reports the loss of the training, so their averages are comparable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxloop._core.lazy import ReadOnlyDict
from jaxloop._core.types import PyTree
from jaxloop._supervised.init import SupervisedInit
from jaxloop._supervised.models import ModelAdapter, ModelLike, adapt
from jaxloop._supervised.steps import StepFn, make_eval_step
from jaxloop.errors import ArgumentTypeError
from jaxloop.losses import LossLike


@dataclasses.dataclass(frozen=True)
class SupervisedTask:
    """The model and the loss of a supervised loop.

    Attributes:
        model: The model, or its adapter.
        loss: The loss. None if the loop has none, as in an evaluation.
    """

    model: ModelLike | ModelAdapter
    loss: LossLike | None = None

    def statics(self) -> Mapping[str, str]:
        """Returns what the model is made of besides its arrays; see `State.statics`."""
        found = adapt(self.model).statics().items()
        # A missing attribute counts as None or False, so these need no place in the record.
        return ReadOnlyDict({path: text for path, text in found if text not in ("None", "False")})

    def eval_state(self, step_state: PyTree) -> PyTree:
        """Returns the step state of the evaluation, made from that of the training.

        Raises:
            ArgumentTypeError: The step state has no model.
        """
        if isinstance(step_state, dict) and "model_state" in step_state:
            return {"model_state": step_state["model_state"]}
        got = type(step_state).__name__
        if isinstance(step_state, dict):
            got = f"a dict with {', '.join(map(repr, step_state)) or 'nothing'}"
        elif hasattr(step_state, "shape"):
            got = f"an array of shape {step_state.shape}"
        raise ArgumentTypeError(
            f"the step state must be a dict with 'model_state', got {got}",
            fix="use jl.trainer, or keep the model's state under 'model_state'",
        )

    def eval_steps(self, model: ModelLike | None = None) -> tuple[SupervisedInit, StepFn]:
        """Makes the init function and the step that evaluate a model with this loss.

        Args:
            model: The model to evaluate instead of this one.
        """
        return make_eval_step(self.model if model is None else model, self.loss)
