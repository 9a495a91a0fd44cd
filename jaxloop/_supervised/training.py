"""The training step: gradients, the optimizer's update, and what the step state carries.

    training = Training(adapter, criterion, optimizer, loss_scale, skips_overflow=False)
    state, evidence = training.init(batch, None, jax.random.key(0))
    emission = training.step(batch, state)

Invariant: ``optimizer_state`` is exactly the state of the user's optimizer. Random numbers are a
function of the key, which never changes, and of the number of the step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxloop._core.arrays import at_least_float32
from jaxloop._core.step_result import Emission, emit
from jaxloop._core.types import PyTree
from jaxloop._supervised import loss_scale as loss_scales
from jaxloop._supervised.criterion import Criterion, Judged
from jaxloop._supervised.init import Evidence
from jaxloop._supervised.loss_scale import LossScale
from jaxloop._supervised.micro_batches import accumulated
from jaxloop._supervised.models import ModelAdapter, merge_state
from jaxloop._supervised.reports import Update, reported
from jaxloop.errors import ArgumentError
from jaxloop.metrics import SKIPPED

EvalParamsFn: TypeAlias = Callable[[dict[str, PyTree]], PyTree]
"""``step_state -> params``: the parameters that are evaluated and returned."""


@dataclasses.dataclass(frozen=True)
class Training:
    """The parts of a training step. Its methods are pure.

    Attributes:
        adapter: The model.
        criterion: The loss.
        optimizer: The optimizer, which takes extra arguments.
        loss_scale: The loss scale.
        skips_overflow: Whether a step whose loss or gradients are not finite changes only the loss
            scale.
        report: The names of what else to report.
        ema_decay: The decay of the average of the parameters, or None.
        num_micro_batches: The number of parts that a batch is split into.
    """

    adapter: ModelAdapter
    criterion: Criterion
    optimizer: optax.GradientTransformationExtraArgs
    loss_scale: LossScale
    skips_overflow: bool
    report: tuple[str, ...] = ()
    ema_decay: float | None = None
    num_micro_batches: int = 1

    def init(
        self, batch: PyTree, prepared: PyTree, key: jax.Array
    ) -> tuple[PyTree, Evidence | None]:
        """Returns the first step state, and what the batch shows about model and labels."""
        adapter, criterion = self.adapter, self.criterion
        key, init_key = jax.random.split(key)
        initialized = initialized_state(adapter, criterion, init_key, batch)
        model_state = merge_state(initialized, prepared)
        params, rest = adapter.split(model_state)
        state = {
            "model_state": adapter.join(params, rest),
            "optimizer_state": self.optimizer.init(params),
            "learning_rate_scale": jnp.ones((), jnp.float32),
            "loss_scale_state": self.loss_scale.init(),
            "key": key,
            "num_steps": jnp.uint32(0),
        }
        if self.ema_decay is not None:
            state["ema_params"] = jax.tree.map(at_least_float32, params)
        # In training mode, as in the steps, because a model may have no other.
        bind = functools.partial(adapter.bind, params, rest, train=True, key=key)
        return state, criterion.evidence(bind, batch)

    def step(self, batch: PyTree, step_state: PyTree) -> Emission:
        """Returns the next step state, and what the step reports."""
        key = jax.random.fold_in(step_state["key"], step_state["num_steps"])
        params, rest = self.adapter.split(step_state["model_state"])
        scale_state = step_state["loss_scale_state"]
        gradient = accumulated(self._forward(scale_state), self.num_micro_batches)
        (_, (judged, new_rest)), grads = gradient(params, rest, batch, key)
        grads, new_scale_state = self.loss_scale.unscale(grads, scale_state)

        def again(params: PyTree) -> tuple[jax.Array, PyTree]:
            (_, (judged, _)), grads = gradient(params, rest, batch, key)
            return judged.loss, self.loss_scale.unscale(grads, scale_state)[0]

        update, needs_more_gradients = self._update(judged.loss, grads, params, step_state, again)
        new = {
            **step_state,  # what a handler added is carried too
            "model_state": self.adapter.join(update.params, new_rest),
            "optimizer_state": update.optimizer_state,
            "num_steps": step_state["num_steps"] + 1,
        }
        if self.ema_decay is not None:
            new["ema_params"] = self._averaged(step_state["ema_params"], update.params)
        outputs = {**judged.outputs, **self._reported(judged, update)}
        if self.skips_overflow:
            finite = jnp.isfinite(judged.loss) & loss_scales.all_finite(grads)
            if needs_more_gradients:
                finite &= loss_scales.all_finite(update.updates)
            new = _select(finite, new, step_state)
            # The metrics do not count the examples of a step that did not happen.
            outputs[SKIPPED] = (~finite).astype(jnp.int32)
        return emit({**new, "loss_scale_state": new_scale_state}, **outputs)

    def _update(
        self,
        loss: jax.Array,
        grads: PyTree,
        params: PyTree,
        step_state: PyTree,
        again: Callable[[PyTree], tuple[jax.Array, PyTree]],
    ) -> tuple[Update, bool]:
        """Returns the update, and whether the optimizer asked for more gradients.

        Args:
            loss: The loss.
            grads: Its gradients.
            params: The parameters.
            step_state: The step state.
            again: Returns the loss and the gradients at other parameters.
        """
        num_extra_gradients = 0

        def value_fn(params: PyTree) -> jax.Array:
            return again(params)[0]

        def grad_fn(params: PyTree, adversarial_step: int = 0) -> PyTree:
            nonlocal num_extra_gradients
            del adversarial_step  # every gradient of a step is that of its batch
            num_extra_gradients += 1
            return again(params)[1]

        # Optax mixes Python floats with int32 counters, even if the user forbids promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = self.optimizer.update(
                grads,
                step_state["optimizer_state"],
                params,
                value=loss,
                grad=grads,
                value_fn=value_fn,
                grad_fn=grad_fn,
                obj_fn=value_fn,
            )
        scale = step_state["learning_rate_scale"]
        updates = jax.tree.map(lambda u: u * scale.astype(u.dtype), updates)
        new_params = optax.apply_updates(params, updates)
        update = Update(grads, updates, new_params, optimizer_state, scale)
        return update, num_extra_gradients > 0

    def _reported(self, judged: Judged, update: Update) -> dict[str, PyTree]:
        taken = sorted(judged.outputs.keys() & set(self.report))
        if taken:
            raise ArgumentError(
                f"the objective must not report {taken[0]!r}, which report= names too",
                fix="give the value another name, or leave it out of report=",
            )
        return reported(self.report, update)

    def _forward(self, scale_state: PyTree) -> Callable[..., Any]:
        def forward(
            params: PyTree, rest: PyTree, batch: PyTree, key: jax.Array
        ) -> tuple[jax.Array, tuple[Judged, PyTree]]:
            model_key, own_key = (jax.random.fold_in(key, i) for i in range(2))
            bound = self.adapter.bind(params, rest, train=True, key=model_key)
            judged = self.criterion(bound, batch, train=True, key=own_key)
            return self.loss_scale.scale(judged.loss, scale_state), (judged, bound.rest())

        return forward

    def _averaged(self, average: PyTree, params: PyTree) -> PyTree:
        decay = self.ema_decay
        assert decay is not None

        def one(old: jax.Array, new: jax.Array) -> jax.Array:
            return old + jnp.asarray(1 - decay, old.dtype) * (new.astype(old.dtype) - old)

        return jax.tree.map(one, average, params)


def initialized_state(
    adapter: ModelAdapter, criterion: Criterion, key: jax.Array, batch: PyTree
) -> PyTree:
    """Returns the initial state of the model."""
    if adapter.holds_state:
        return adapter.init(key, lambda bound: None)
    return adapter.init(key, lambda bound: criterion.initialize(bound, batch))


def _select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
