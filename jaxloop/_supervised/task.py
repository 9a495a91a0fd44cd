"""The model and the loss of a supervised loop, for the handlers that evaluate its model.

    task = SupervisedTask(adapter, criterion)
    init_fn, step_fn = task.eval_steps()
    step_state = task.eval_state(trained_step_state)

Invariant: an evaluation reports the loss of the training, so their averages are comparable. What is
evaluated is what a run returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxloop._core.lazy import ReadOnlyDict
from jaxloop._core.types import PyTree
from jaxloop._data.in_memory import Batches
from jaxloop._data.mixture import Mixture
from jaxloop._supervised.criterion import Criterion
from jaxloop._supervised.evaluation import StepFn, eval_state, evaluation_steps
from jaxloop._supervised.init import SupervisedInit
from jaxloop._supervised.models import ModelAdapter, ModelLike, adapt
from jaxloop._supervised.training import EvalParamsFn
from jaxloop.errors import ArgumentTypeError, DataError


@dataclasses.dataclass(frozen=True)
class SupervisedTask:
    """The model and the loss of a supervised loop.

    Attributes:
        adapter: The model.
        criterion: What an evaluation reports.
        loss: The loss or the objective as the user passed it. None if there is none.
        eval_params: Which parameters are evaluated and returned, or None for those that the
            optimizer updates.
        kind: The type of the user's model, for an error message.
        training_only: The names that only the step of the training reports.
        trains: Whether it is the task of a trainer.
        learning_rate: The rate of an optimizer that was given by its name, or None.
    """

    adapter: ModelAdapter
    criterion: Criterion
    loss: Any = None
    eval_params: EvalParamsFn | None = None
    kind: str = "a model"
    training_only: tuple[str, ...] = ()
    trains: bool = False
    learning_rate: float | None = None

    def statics(self) -> Mapping[str, str]:
        """Returns what the model is made of besides its arrays; see `State.statics`."""
        found = self.adapter.statics().items()
        # A missing attribute counts as None or False, so these need no place in the record.
        return ReadOnlyDict({path: text for path, text in found if text not in ("None", "False")})

    def model_state(self, step_state: PyTree) -> PyTree:
        """Returns the state of the model to evaluate and to return.

        Raises:
            ArgumentTypeError: The step state has no model.
        """
        if not isinstance(step_state, dict) or "model_state" not in step_state:
            raise _no_model(step_state)
        model_state = step_state["model_state"]
        if self.eval_params is None:
            return model_state
        params, rest = self.adapter.split(model_state)
        found = self.eval_params(step_state)
        return self.adapter.join(like_params(found, params), rest)

    def eval_state(self, step_state: PyTree) -> PyTree:
        """Returns the step state of the evaluation, made from that of the training.

        Raises:
            ArgumentTypeError: The step state has no model.
        """
        return eval_state(self.model_state(step_state))

    def eval_steps(self, model: ModelLike | None = None) -> tuple[SupervisedInit, StepFn]:
        """Makes the init function and the step that evaluate a model with this loss.

        Args:
            model: The model to evaluate instead of this one.
        """
        if model is None:
            return evaluation_steps(self.adapter, self.criterion, self.kind)
        return evaluation_steps(adapt(model), self.criterion, type(model).__name__)

    def check_data(self, data: Any, reported: Collection[str]) -> None:
        """Raises if the data have padding that the step does not weight.

        Args:
            data: What the run iterates over.
            reported: The names that the step reports.

        Raises:
            DataError: The data are padded, and the step reports no weights.
        """
        if isinstance(data, Batches | Mixture) and data.pad and "sample_weight" not in reported:
            raise DataError(
                "the data are padded (pad=True), so the step must know which examples are padding, "
                "got a step without weights",
                fix="pass weights= to say where the mask is: 'mask' in a dict, or "
                "lambda batch: batch[2] in a tuple; or return a 'sample_weight' from the objective",
            )


def like_params(found: PyTree, params: PyTree) -> PyTree:
    """Returns parameters in the structure and the dtypes of the model's own.

    Raises:
        ArgumentTypeError: They have another structure or other shapes.
    """
    expected: object = jax.tree.structure(params)
    same = expected == jax.tree.structure(found)
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True) if same else ()
    if not same or any(jnp.shape(a) != jnp.shape(b) for a, b in leaves):
        raise ArgumentTypeError(
            "eval_params must return the parameters of the model, of the structure "
            f"{expected}, got {jax.tree.structure(found)}",
            fix="return a tree like that of the parameters in step_state['model_state']",
        )
    return jax.tree.map(lambda a, b: jnp.asarray(a).astype(b.dtype), found, params)


def _no_model(step_state: PyTree) -> ArgumentTypeError:
    got = type(step_state).__name__
    if isinstance(step_state, dict):
        got = f"a dict with {', '.join(map(repr, step_state)) or 'nothing'}"
    elif hasattr(step_state, "shape"):
        got = f"an array of shape {step_state.shape}"
    return ArgumentTypeError(
        f"the step state must be a dict with 'model_state', got {got}",
        fix="use jl.trainer, or keep the model's state under 'model_state'",
    )
