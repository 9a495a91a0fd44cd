"""The model and the loss of a supervised loop, for the handlers that evaluate its model.

    task = SupervisedTask(model, "mean_squared_error")
    init_fn, step_fn = task.eval_steps()

Invariant: an evaluation reports the loss of the training, so their averages are comparable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxloop._core.lazy import ReadOnlyDict
from jaxloop._supervised.init import SupervisedInit
from jaxloop._supervised.models import ModelAdapter, ModelLike, adapt
from jaxloop._supervised.steps import StepFn, make_eval_step
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

    def eval_steps(self, model: ModelLike | None = None) -> tuple[SupervisedInit, StepFn]:
        """Makes the init function and the step that evaluate a model with this loss.

        Args:
            model: The model to evaluate instead of this one.
        """
        return make_eval_step(self.model if model is None else model, self.loss)
