"""The evaluation step: predictions in evaluation mode, and the loss if there is one.

    init_fn, step_fn = evaluation_steps(adapter, criterion)
    state = init_fn(batch, model_state)
    emission = step_fn(batch, state)

Invariant: an evaluation changes nothing but the number of its step, from which it draws, so the
same batch at the same place gets the same random numbers each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._core.step_result import Emission, emit
from jaxloop._core.types import PyTree
from jaxloop._supervised.criterion import Criterion, Judged
from jaxloop._supervised.init import Evidence, SupervisedInit
from jaxloop._supervised.models import ModelAdapter, merge_state
from jaxloop._supervised.training import initialized_state
from jaxloop.errors import ArgumentError

StepFn: TypeAlias = Callable[[PyTree, PyTree], Emission]


def eval_state(model_state: PyTree) -> PyTree:
    """Returns the step state of an evaluation."""
    return {"model_state": model_state, "num_steps": np.uint32(0)}


def evaluation_steps(
    adapter: ModelAdapter, criterion: Criterion, kind: str
) -> tuple[SupervisedInit, StepFn]:
    """Makes the init function and the step of an evaluation.

    Args:
        adapter: The model.
        criterion: What the step reports.
        kind: The type of the user's model, for an error message.
    """

    def init_fn(batch: PyTree, prepared: PyTree) -> tuple[PyTree, Evidence | None]:
        check_given(adapter, kind, prepared)
        initialized = initialized_state(adapter, criterion, jax.random.key(0), batch)
        merged = merge_state(initialized, prepared, complete=not adapter.holds_state)
        return eval_state(merged), None

    def step_fn(batch: PyTree, step_state: PyTree) -> Emission:
        number = step_state.get("num_steps", jnp.uint32(0))  # a bare model state has none
        key = jax.random.fold_in(jax.random.key(0), number)
        judged = _judged(adapter, criterion, batch, step_state["model_state"], key)
        new = {**step_state, "num_steps": number + 1} if "num_steps" in step_state else step_state
        return emit(new, **judged.outputs)

    return SupervisedInit(init_fn, adapter.load), step_fn


def check_given(adapter: ModelAdapter, kind: str, prepared: PyTree) -> None:
    """Raises if a model has no state to evaluate.

    Raises:
        ArgumentError: No state was given, and the model does not hold one.
    """
    if prepared is None and not adapter.holds_state:
        raise ArgumentError(
            "an evaluation must have the state of its model, got none, and the model "
            f"({kind}) does not hold one",
            fix="pass what the trainer returned, as in evaluator(model).run(data, model_state)",
        )


def _judged(
    adapter: ModelAdapter,
    criterion: Criterion,
    batch: PyTree,
    model_state: PyTree,
    key: jax.Array,
) -> Judged:
    """Returns the predictions and the loss in evaluation mode."""
    params, rest = adapter.split(model_state)
    model_key, own_key = (jax.random.fold_in(key, i) for i in range(2))
    # Without a key first, because many models take a key as the sign of training.
    with contextlib.suppress(Exception):
        bound = adapter.bind(params, rest, train=False, key=None)
        return criterion(bound, batch, train=False, key=own_key)
    # A model that draws in evaluation too, such as one with a dropout but no train flag, needs one.
    bound = adapter.bind(params, rest, train=False, key=model_key)
    return criterion(bound, batch, train=False, key=own_key)
