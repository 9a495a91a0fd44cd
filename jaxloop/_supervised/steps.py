"""The supervised steps: a model, a loss and an optimizer as ``(init_fn, step_fn)``.

    init_fn, step_fn = make_train_step(model, "mean_squared_error", "adam")
    state = init_fn(batch, None)
    state = step_fn(batch, state).state

Gradients are of the weighted mean over the batch's examples; what is reported is what a metric
needs to be exact over the data set: targets, predictions, weights, and the mean itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxloop import losses, optimizers
from jaxloop._core.step_result import Emission, emit
from jaxloop._core.types import PyTree
from jaxloop._supervised import loss_scale as loss_scales
from jaxloop._supervised.models import adapt
from jaxloop._supervised.models.adapted import Adapted, merge_state
from jaxloop.errors import DataError

StepFn = Callable[[PyTree, PyTree], Emission]


def unpack(batch: PyTree) -> tuple[PyTree, PyTree, Any]:
    """A supervised batch as ``(x, y, sample_weight)``; the weight may be None.

    Raises:
        DataError: It is neither a pair nor a triple; the error says what came.

    Example:
        >>> unpack((1, 2))
        (1, 2, None)
    """
    if isinstance(batch, tuple | list):
        if len(batch) == 2:
            return batch[0], batch[1], None
        if len(batch) == 3:
            return batch[0], batch[1], batch[2]
        came = f"a {type(batch).__name__} of {len(batch)}"
    elif hasattr(batch, "shape"):
        came = f"an array of shape {batch.shape}"
    else:
        came = f"a {type(batch).__name__}"
    raise DataError(
        f"a supervised batch must be (x, y) or (x, y, sample_weight), and came as {came}",
        fix="serve pairs; for arrays in memory use jl.batches((x, y), batch_size)",
    )


@dataclasses.dataclass(frozen=True)
class Init:
    """An init function; ``prepare`` turns what the user passed to `run` into arrays."""

    fn: Callable[[PyTree, PyTree], PyTree]
    prepare: Callable[[Any], PyTree]

    def __call__(self, batch: PyTree, init_state: Any = None) -> PyTree:
        return self.fn(batch, self.prepare(init_state))


def _model_state(adapted: Adapted, key: jax.Array, x: PyTree, given: PyTree) -> PyTree:
    return merge_state(adapted.init(key, x), given)


def _num_examples(y: PyTree) -> int:
    leaves = jax.tree.leaves(y)
    return leaves[0].shape[0] if leaves and leaves[0].ndim else 1


def _select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _probable(loss: losses.Loss, prediction: PyTree) -> jax.Array:
    """Whether predictions can be probabilities, as well as one batch can tell."""
    checks = []
    for leaf in jax.tree.leaves(prediction):
        p = leaf.astype(jnp.float32)
        good = jnp.isnan(p) | ((p >= -1e-6) & (p <= 1 + 1e-6))
        checks.append(jnp.all(good))
        if "categorical" in loss.name and p.ndim > 1 and p.shape[-1] > 1:
            sums = jnp.sum(p, -1)
            checks.append(jnp.all(jnp.isnan(sums) | (jnp.abs(sums - 1) < 1e-2)))
    return jnp.all(jnp.stack(checks)) if checks else jnp.bool_(True)


def make_train_step(
    model: Any,
    loss: Any,
    optimizer: Any,
    *,
    loss_scale: Any = "identity",
    seed: int = 0,
) -> tuple[Init, StepFn]:
    """See `jaxloop.train_step`; the init function also reports whether probabilities came."""
    adapted, found = adapt(model), losses.get(loss)
    optimizer = optimizers.with_scale(optimizers.get(optimizer))
    scaling = loss_scales.get(loss_scale)
    scaled = not (isinstance(loss_scale, str) and loss_scale == "identity")

    def init_fn(batch: PyTree, init_state: PyTree) -> PyTree:
        x, _, _ = unpack(batch)
        key, init_key = jax.random.split(jax.random.key(seed))
        model_state = _model_state(adapted, init_key, x, init_state)
        params, rest = adapted.split(model_state)
        state = {
            "model_state": adapted.join(params, rest),
            "optimizer_state": optimizer.init(params),
            "loss_scale_state": scaling.init(),
            "key": key,
        }
        if not found.probabilities:
            return state
        prediction, _ = adapted.apply(params, rest, x, train=False, key=key)
        return emit(state, _probabilities_ok=_probable(found, prediction))

    def step_fn(batch: PyTree, step_state: PyTree) -> Emission:
        x, y, weight = unpack(batch)
        key, step_key = jax.random.split(step_state["key"])
        params, rest = adapted.split(step_state["model_state"])
        scale_state = step_state["loss_scale_state"]

        def objective(params: PyTree) -> tuple[Any, Any]:
            prediction, new_rest = adapted.apply(params, rest, x, train=True, key=step_key)
            value = losses.reduce(found.fn(y, prediction), weight, _num_examples(y))
            return scaling.scale(value, scale_state), (value, prediction, new_rest)

        gradient = jax.value_and_grad(objective, has_aux=True)
        (_, (value, prediction, new_rest)), grads = gradient(params)
        grads, new_scale_state = scaling.unscale(grads, scale_state)
        # Optax promotes Python floats with int32 counters, also where the user forbids promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(
                grads, step_state["optimizer_state"], params, value=value
            )
        new_params = optax.apply_updates(params, updates)
        if scaled:
            # A step whose gradients overflowed changes nothing but the scale.
            finite = loss_scales.all_finite(grads)
            new_params = _select(finite, new_params, params)
            new_rest = _select(finite, new_rest, rest)
            optimizer_state = _select(finite, optimizer_state, step_state["optimizer_state"])
        state = {
            "model_state": adapted.join(new_params, new_rest),
            "optimizer_state": optimizer_state,
            "loss_scale_state": new_scale_state,
            "key": key,
        }
        return _report(state, y, prediction, weight, loss=value)

    return Init(init_fn, adapted.load), step_fn


def make_eval_step(model: Any, loss: Any = None) -> tuple[Init, StepFn]:
    """See `jaxloop.eval_step`; with a loss, its mean is reported too."""
    adapted = adapt(model)
    found = None if loss is None else losses.get(loss)

    def init_fn(batch: PyTree, init_state: PyTree) -> PyTree:
        x, _, _ = unpack(batch)
        return {"model_state": _model_state(adapted, jax.random.key(0), x, init_state)}

    def step_fn(batch: PyTree, step_state: PyTree) -> Emission:
        x, y, weight = unpack(batch)
        params, rest = adapted.split(step_state["model_state"])
        prediction, _ = adapted.apply(params, rest, x, train=False, key=None)
        if found is None:
            return _report(step_state, y, prediction, weight)
        value = losses.reduce(found.fn(y, prediction), weight, _num_examples(y))
        return _report(step_state, y, prediction, weight, loss=value)

    return Init(init_fn, adapted.load), step_fn


def _report(
    state: PyTree, y: PyTree, prediction: PyTree, weight: Any, **values: PyTree
) -> Emission:
    if weight is not None:
        values["sample_weight"] = weight
    return emit(state, y_true=y, y_pred=prediction, **values)
