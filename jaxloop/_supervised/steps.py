"""The supervised steps: a model, a loss and an optimizer as ``(init_fn, step_fn)``.

    init_fn, step_fn = make_train_step(model, "mean_squared_error", "adam")
    state = init_fn(batch, None)
    state = step_fn(batch, state).state

Invariant: gradients are those of the weighted mean over the examples of the batch. The step reports
what a metric needs to be exact over the data set: targets, predictions, weights, and the mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxloop import losses, optimizers
from jaxloop._core.step_result import Emission, emit
from jaxloop._core.types import PyTree
from jaxloop._supervised import loss_scale as loss_scales
from jaxloop._supervised.init import Evidence, SupervisedInit, may_be_probabilities
from jaxloop._supervised.loss_scale import LossScale, LossScaleLike
from jaxloop._supervised.models import ModelAdapter, ModelLike, adapt, merge_state
from jaxloop.errors import ArgumentError, DataError
from jaxloop.losses import Loss, LossLike
from jaxloop.metrics import SKIPPED
from jaxloop.optimizers import OptimizerLike

StepFn: TypeAlias = Callable[[PyTree, PyTree], Emission]


def unpack(batch: PyTree) -> tuple[PyTree, PyTree, ArrayLike | None]:
    """Returns a supervised batch as ``(x, y, sample_weight)``, where the weight may be None.

    Raises:
        DataError: The batch is neither a pair nor a triple.

    Example:
        >>> unpack((1, 2))
        (1, 2, None)
    """
    if isinstance(batch, tuple | list):
        if len(batch) == 2:
            return batch[0], batch[1], None
        if len(batch) == 3:
            return batch[0], batch[1], batch[2]
        got = f"a {type(batch).__name__} of {len(batch)}"
    elif hasattr(batch, "shape"):
        got = f"an array of shape {batch.shape}"
    else:
        got = f"a {type(batch).__name__}"
    raise DataError(
        f"a supervised batch must be (x, y) or (x, y, sample_weight), got {got}",
        fix="pass batches (x, y); for arrays in memory, use jl.batches((x, y), batch_size)",
    )


def make_train_step(
    model: ModelLike | ModelAdapter,
    loss: LossLike,
    optimizer: OptimizerLike,
    *,
    loss_scale: LossScaleLike = "identity",
    seed: int = 0,
) -> tuple[SupervisedInit, StepFn]:
    """Makes the init function and the step of `jaxloop.trainer`."""
    training = _Training(
        adapt(model),
        losses.get(loss),
        optimizers.with_scale(optimizers.get(optimizer)),
        loss_scales.get(loss_scale),
        skips_overflow=loss_scale != "identity",
    )

    def init_fn(batch: PyTree, prepared: PyTree) -> tuple[PyTree, Evidence]:
        return training.init(batch, prepared, jax.random.key(seed))

    def step_fn(batch: PyTree, step_state: PyTree) -> Emission:
        return training.step(batch, step_state)

    return SupervisedInit(init_fn, training.adapter.load, training.loss), step_fn


def make_eval_step(
    model: ModelLike | ModelAdapter, loss: LossLike | None = None
) -> tuple[SupervisedInit, StepFn]:
    """Makes the init function and the step of an evaluation.

    If a loss is given, the step reports its mean over the batch too.
    """
    adapter = adapt(model)
    found = None if loss is None else losses.get(loss)

    def init_fn(batch: PyTree, prepared: PyTree) -> tuple[PyTree, Evidence]:
        x, _, _ = unpack(batch)
        holds = adapter.holds_state
        if prepared is None and not holds:
            raise ArgumentError(
                "an evaluation must have the state of its model, got none, and the model "
                f"({type(model).__name__}) does not hold one",
                fix="pass what the trainer returned, as in evaluator(model).run(data, model_state)",
            )
        initialized = adapter.init(jax.random.key(0), x)
        return {"model_state": merge_state(initialized, prepared, complete=not holds)}, None

    def step_fn(batch: PyTree, step_state: PyTree) -> Emission:
        x, y, weight = unpack(batch)
        params, rest = adapter.split(step_state["model_state"])
        prediction = _evaluate(adapter, params, rest, x)
        if found is None:
            return _report(step_state, y, prediction, weight)
        value = losses.reduce(found.fn(y, prediction), weight, _num_examples(y))
        return _report(step_state, y, prediction, weight, loss=value)

    return SupervisedInit(init_fn, adapter.load), step_fn


def _evaluate(adapter: ModelAdapter, params: PyTree, rest: PyTree, x: PyTree) -> PyTree:
    """Returns the predictions in evaluation mode."""
    # Without a key first, because many models take a key as the sign of training.
    with contextlib.suppress(Exception):
        return adapter.apply(params, rest, x, train=False, key=None)[0]
    # A model that draws in evaluation too, such as one with a dropout but no train flag, needs a
    # key. A fixed one makes the evaluation repeatable.
    return adapter.apply(params, rest, x, train=False, key=jax.random.key(0))[0]


@dataclasses.dataclass(frozen=True)
class _Training:
    """The parts of a training step. Its methods are pure.

    Attributes:
        skips_overflow: Whether a step whose loss or gradients are not finite changes only the loss
            scale.
    """

    adapter: ModelAdapter
    loss: Loss
    optimizer: optax.GradientTransformationExtraArgs
    loss_scale: LossScale
    skips_overflow: bool

    def init(self, batch: PyTree, prepared: PyTree, key: jax.Array) -> tuple[PyTree, Evidence]:
        adapter = self.adapter
        x, _, _ = unpack(batch)
        key, init_key = jax.random.split(key)
        model_state = merge_state(adapter.init(init_key, x), prepared)
        params, rest = adapter.split(model_state)
        state = {
            "model_state": adapter.join(params, rest),
            "optimizer_state": self.optimizer.init(params),
            "loss_scale_state": self.loss_scale.init(),
            "key": key,
        }
        if not self.loss.probabilities:
            return state, None
        # In training mode, as in the steps, because a model may have no other.
        prediction, _ = adapter.apply(params, rest, x, train=True, key=key)
        return state, may_be_probabilities(self.loss, prediction)

    def step(self, batch: PyTree, step_state: PyTree) -> Emission:
        adapter = self.adapter
        x, y, weight = unpack(batch)
        key, step_key = jax.random.split(step_state["key"])
        params, rest = adapter.split(step_state["model_state"])
        scale_state = step_state["loss_scale_state"]

        def objective(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree, PyTree]]:
            prediction, new_rest = adapter.apply(params, rest, x, train=True, key=step_key)
            value = losses.reduce(self.loss.fn(y, prediction), weight, _num_examples(y))
            return self.loss_scale.scale(value, scale_state), (value, prediction, new_rest)

        gradient = jax.value_and_grad(objective, has_aux=True)
        (_, (value, prediction, new_rest)), grads = gradient(params)
        grads, new_scale_state = self.loss_scale.unscale(grads, scale_state)

        def value_fn(params: PyTree) -> jax.Array:
            return objective(params)[1][0]

        num_extra_gradients = 0

        def grad_fn(params: PyTree, adversarial_step: int = 0) -> PyTree:
            nonlocal num_extra_gradients
            del adversarial_step  # every gradient of a step is that of its batch
            num_extra_gradients += 1
            return self.loss_scale.unscale(gradient(params)[1], scale_state)[0]

        # Optax mixes Python floats with int32 counters, even if the user forbids promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = self.optimizer.update(
                grads,
                step_state["optimizer_state"],
                params,
                value=value,
                grad=grads,
                value_fn=value_fn,
                grad_fn=grad_fn,
                obj_fn=value_fn,
            )
        new_params = optax.apply_updates(params, updates)
        skipped = {}
        if self.skips_overflow:
            finite = jnp.isfinite(value) & loss_scales.all_finite(grads)
            if num_extra_gradients:
                finite &= loss_scales.all_finite(updates)
            new_params = _select(finite, new_params, params)
            new_rest = _select(finite, new_rest, rest)
            optimizer_state = _select(finite, optimizer_state, step_state["optimizer_state"])
            key = _select(finite, key, step_state["key"])
            # The metrics do not count the examples of a step that did not happen.
            skipped = {SKIPPED: (~finite).astype(jnp.int32)}
        state = {
            **step_state,  # what a handler added is carried too
            "model_state": adapter.join(new_params, new_rest),
            "optimizer_state": optimizer_state,
            "loss_scale_state": new_scale_state,
            "key": key,
        }
        return _report(state, y, prediction, weight, loss=value, **skipped)


def _num_examples(y: PyTree) -> int:
    leaves = jax.tree.leaves(y)
    return leaves[0].shape[0] if leaves and leaves[0].ndim else 1


def _select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _report(
    state: PyTree, y: PyTree, prediction: PyTree, weight: ArrayLike | None, **values: PyTree
) -> Emission:
    if weight is not None:
        values["sample_weight"] = weight
    return emit(state, y_true=y, y_pred=prediction, **values)
