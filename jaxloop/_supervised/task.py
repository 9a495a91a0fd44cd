"""The model and the loss of a supervised loop, for the handlers that evaluate its model.

    task = SupervisedTask(model, "mean_squared_error")
    init_fn, step_fn = task.eval_steps()

Invariant: an evaluation reports the loss of the training, so their averages are comparable.
"""

from __future__ import annotations

import dataclasses

from jaxloop._supervised.init import SupervisedInit
from jaxloop._supervised.models import ModelLike
from jaxloop._supervised.steps import StepFn, make_eval_step
from jaxloop.losses import LossLike


@dataclasses.dataclass(frozen=True)
class SupervisedTask:
    """The model and the loss of a supervised loop.

    Attributes:
        model: The model.
        loss: The loss. None if the loop has none, as in an evaluation.
    """

    model: ModelLike
    loss: LossLike | None = None

    def eval_steps(self, model: ModelLike | None = None) -> tuple[SupervisedInit, StepFn]:
        """Makes the init function and the step that evaluate a model with this loss.

        Args:
            model: The model to evaluate instead of this one.
        """
        return make_eval_step(self.model if model is None else model, self.loss)
