"""What a supervised loop knows beyond its step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxloop import losses as loss_functions
from jaxloop._core.types import PyTree
from jaxloop._supervised.steps import StepFn, make_eval_step
from jaxloop.errors import ArgumentError

InitFn = Callable[[PyTree, PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class Supervised:
    """What a supervised loop knows beyond its step: the model, the loss, and how to check them."""

    model: Any
    loss: Any = None
    prepare_fn: Callable[[PyTree], PyTree] | None = None

    def prepare(self, init_state: PyTree) -> PyTree:
        """What the user passed to `run`, as arrays that can go through `jax.jit`."""
        return init_state if self.prepare_fn is None else self.prepare_fn(init_state)

    def check(self, outputs: dict[str, PyTree]) -> None:
        """Raises if the sample batch's predictions cannot be what the loss takes."""
        ok = outputs.get("_probabilities_ok")
        if ok is not None and not bool(np.asarray(ok)):
            name = getattr(loss_functions.get(self.loss), "name", self.loss)
            raise ArgumentError(
                f"the loss {name!r} takes probabilities, and the model's predictions for the first "
                "batch are none: they leave [0, 1] or do not sum to 1",
                fix="the model ends in logits: use from_logits=True (for example "
                "functools.partial(jl.losses.categorical_cross_entropy, from_logits=True)) or "
                "optax.softmax_cross_entropy, optax.sigmoid_binary_cross_entropy",
            )

    def eval_steps(self, model: Any) -> tuple[InitFn, StepFn]:
        """The evaluation of ``model``, or of the trainer's own, with the trainer's loss."""
        return make_eval_step(self.model if model is None else model, self.loss)
