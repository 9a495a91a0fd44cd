"""Supervised loops: `trainer`, `evaluator`, and the bare steps that they are made of.

loop = trainer(model, "softmax_cross_entropy_with_integer_labels", "adam").metric("accuracy")
model_state = loop.run(batches((x, y), 32), epochs=10)
evaluator(model).metric("accuracy").run(batches((x, y), 32), model_state)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxloop._core.interrupts import Interrupted
from jaxloop._core.state import State
from jaxloop._core.step_result import split_emission
from jaxloop._core.types import PyTree
from jaxloop._loop import Loop
from jaxloop._supervised.models import adapt
from jaxloop._supervised.steps import make_eval_step, make_train_step
from jaxloop._supervised.task import Supervised
from jaxloop.errors import ArgumentError, ArgumentTypeError
from jaxloop.handlers.log import log_progress
from jaxloop.metrics.declare import declare_batch_mean

InitFn = Callable[[PyTree, PyTree], PyTree]


StepFn = Callable[[PyTree, PyTree], PyTree]


def train_step(
    model: Any,
    loss: Any,
    optimizer: Any,
    *,
    loss_scale: Any = "identity",
    seed: int = 0,
) -> tuple[InitFn, StepFn]:
    """The bare ``(init_fn, step_fn)`` of supervised training.

    Args:
        model: A Flax Linen, Flax NNX or Equinox module, a `Model`, a pair, or a container of them.
        loss: A name, a function ``(y_true, y_pred)``, one of Optax's, or a list of
            ``(loss, weight)``.
        optimizer: An `optax.GradientTransformation` or a name.
        loss_scale: "identity", "static", "dynamic", or ``(init, scale, unscale)``.
        seed: What parameters and dropout are drawn from.

    Returns:
        ``init_fn(batch, init_state)`` and ``step_fn(batch, step_state)``; the step state is a dict
        of ``model_state``, ``optimizer_state``, ``loss_scale_state`` and ``key``.

    Raises:
        ModelError: The model is none of the known kinds.
        UnknownNameError: The loss, the optimizer or the loss scale is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> model = (lambda key, x: jnp.zeros((2, 1)), lambda w, x: x @ w)
        >>> init_fn, step_fn = train_step(model, "mean_squared_error", "sgd")
        >>> batch = (jnp.ones((4, 2)), jnp.ones((4, 1)))
        >>> sorted(init_fn(batch, None))
        ['key', 'loss_scale_state', 'model_state', 'optimizer_state']
    """
    init_fn, step_fn = make_train_step(model, loss, optimizer, loss_scale=loss_scale, seed=seed)

    def init(batch: PyTree, init_state: PyTree = None) -> PyTree:
        return split_emission(init_fn(batch, init_state))[0]

    return init, step_fn


def eval_step(model: Any) -> tuple[InitFn, StepFn]:
    """The bare ``(init_fn, step_fn)`` of supervised evaluation; reports ``y_true``, ``y_pred``.

    Example:
        >>> import jax.numpy as jnp
        >>> init_fn, step_fn = eval_step((lambda key, x: jnp.ones((2, 1)), lambda w, x: x @ w))
        >>> batch = (jnp.ones((4, 2)), jnp.ones((4, 1)))
        >>> float(step_fn(batch, init_fn(batch, None)).outputs["y_pred"][0, 0])
        2.0
    """
    return make_eval_step(model)


def trainer(
    model: Any,
    loss: Any,
    optimizer: Any,
    *,
    loss_scale: Any = "identity",
    log: int = 50,
    seed: int = 0,
) -> Loop:
    """Supervised training; `Loop.run` returns what the model's user works with.

    Args:
        model: As for `train_step`.
        loss: As for `train_step`; its exact average over the epoch is the metric "loss".
        optimizer: As for `train_step`.
        loss_scale: As for `train_step`.
        log: A line of progress each ``log`` iterations of an epoch and at its end, and one that
            says where the time went at the end of the run; 0: none.
        seed: As for `train_step`.

    Raises:
        ModelError: The model is none of the known kinds.
        UnknownNameError: The loss, the optimizer or the loss scale is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> model = (lambda key, x: jnp.zeros((1, 1)), lambda w, x: x @ w)
        >>> x = jnp.linspace(-1.0, 1.0, 32)[:, None]
        >>> w = trainer(model, "mean_squared_error", "sgd", log=0).run([(x, 2 * x)], epochs=500)
        >>> round(float(w[0, 0]), 1)
        1.9
    """
    if isinstance(log, bool) or not isinstance(log, int):
        raise ArgumentTypeError(f"trainer: log must be a whole number, and is {log!r}")
    if log < 0:
        raise ArgumentError(f"trainer: log must be at least 0, and is {log}")
    init_fn, step_fn = make_train_step(model, loss, optimizer, loss_scale=loss_scale, seed=seed)
    adapted = adapt(model)

    def output(state: State) -> Any:
        return adapted.export(state.step_state["model_state"])

    task = Supervised(model, loss, init_fn.prepare)
    metrics = (declare_batch_mean("loss", "loss"),)
    loop: Loop[Any, Any] = Loop(step_fn, init_fn.fn, output, metrics=metrics, task=task)
    return log_progress(loop, log) if log else loop


def evaluator(model: Any) -> Loop:
    """Supervised evaluation; ``run(data, model_state)`` returns ``{name: value}``.

    Args:
        model: As for `train_step`.

    Raises:
        ModelError: The model is none of the known kinds.

    Example:
        >>> import jax.numpy as jnp
        >>> model = (lambda key, x: jnp.ones((1, 1)), lambda w, x: x @ w)
        >>> x = jnp.ones((4, 1))
        >>> out = evaluator(model).metric("mean_absolute_error").run([(x, 3 * x)], jnp.ones((1, 1)))
        >>> float(out["mean_absolute_error"])
        2.0
    """
    init_fn, step_fn = make_eval_step(model)

    def output(state: State) -> dict[str, Any]:
        if state.status == "interrupted":
            # Values of a part of the data would pass for those of all.
            raise Interrupted(f"the evaluation was interrupted by {state.halted_by}")
        return dict(state.history[max(state.history)]) if state.history else dict(state.metrics)

    return Loop(step_fn, init_fn.fn, output, task=Supervised(model, None, init_fn.prepare))
