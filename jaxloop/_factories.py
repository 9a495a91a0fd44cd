"""Supervised loops (`trainer`, `evaluator`), and the step functions behind them.

    loop = trainer(model, "softmax_cross_entropy_with_integer_labels", "adam").metric("accuracy")
    model_state = loop.run(batches((x, y), 32), epochs=10)
    values = evaluator(model).metric("accuracy").run(batches((x, y), 32), model_state)

Invariant: a factory checks its arguments when you call it, before any data are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxloop._core.interrupts import Interrupted
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop._loop import Loop
from jaxloop._supervised.loss_scale import LossScaleLike
from jaxloop._supervised.models import ModelLike, adapt
from jaxloop._supervised.steps import make_eval_step, make_train_step
from jaxloop._supervised.task import SupervisedTask
from jaxloop.errors import ArgumentError, ArgumentTypeError
from jaxloop.handlers.log import log_progress
from jaxloop.losses import LossLike
from jaxloop.metrics.declare import declare_batch_mean
from jaxloop.optimizers import OptimizerLike

InitFn: TypeAlias = Callable[[PyTree, PyTree], PyTree]
"""``(batch, init_state) -> step_state``."""

StepState: TypeAlias = dict[str, PyTree]
"""The step state of a supervised loop."""

StepFn: TypeAlias = Callable[[PyTree, PyTree], PyTree]
"""``(batch, step_state) -> step_state``, or the result of `jaxloop.emit`."""


def train_step(
    model: ModelLike,
    loss: LossLike,
    optimizer: OptimizerLike,
    *,
    loss_scale: LossScaleLike = "identity",
    seed: int = 0,
) -> tuple[InitFn, StepFn]:
    """Makes the ``(init_fn, step_fn)`` of supervised training.

    Args:
        model: A Flax Linen, Flax NNX or Equinox module, a transformed Haiku function, a `Model`, a
            pair ``(init, apply)``, or a tuple, list or dict of models. A Linen module or a Haiku
            function learns from a flag whether it trains: ``train``, ``training``,
            ``deterministic``, ``use_running_average`` or, for Haiku, ``is_training``.
        loss: A name, a function of ``(y_true, y_pred)``, a loss of Optax, or a list of
            ``(loss, weight)``.
        optimizer: An `optax.GradientTransformation` or a name. Its update gets those of these
            arguments that it takes: ``value``, the loss; ``grad``, the gradients; ``value_fn`` and
            ``obj_fn``, the loss of this batch as a function of the parameters; ``grad_fn``, its
            gradients as a function of the parameters and a number, which is ignored.
        loss_scale: "identity", "static", "dynamic", or ``(init, scale, unscale)``. Except for
            "identity", a step whose loss or gradients are not finite changes only the scale, and
            no metric counts its examples.
        seed: The seed of the initial parameters and of dropout.

    Returns:
        ``init_fn(batch, init_state)`` and ``step_fn(batch, step_state)``. The step state is a dict
        of ``model_state``, ``optimizer_state``, ``loss_scale_state`` and ``key``.

    Raises:
        ModelError: The model is of an unknown kind. Raised by the step if a forward pass changes
            the structure of its state.
        UnknownNameError: The loss, the optimizer or the loss scale is unknown.
        ArgumentError: Raised by the step if the optimizer needs other arguments.

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
        return init_fn(batch, init_state)

    return init, step_fn


def eval_step(model: ModelLike) -> tuple[InitFn, StepFn]:
    """Makes the ``(init_fn, step_fn)`` of supervised evaluation.

    Args:
        model: See `train_step`.

    Returns:
        ``init_fn(batch, model_state)`` and ``step_fn(batch, step_state)``. The step reports
        ``y_true``, ``y_pred`` and, if the batch has weights, ``sample_weight``. See `evaluator`
        for the model state.

    Raises:
        ModelError: The model is of an unknown kind. Raised by ``init_fn`` if the model state does
            not fit the model.
        ArgumentError: Raised by ``init_fn`` without a model state.

    Example:
        >>> import jax.numpy as jnp
        >>> init_fn, step_fn = eval_step((lambda key, x: jnp.ones((2, 1)), lambda w, x: x @ w))
        >>> batch, weights = (jnp.ones((4, 2)), jnp.ones((4, 1))), jnp.full((2, 1), 3.0)
        >>> float(step_fn(batch, init_fn(batch, weights)).outputs["y_pred"][0, 0])
        6.0
    """
    return make_eval_step(model)


def trainer(
    model: ModelLike,
    loss: LossLike,
    optimizer: OptimizerLike,
    *,
    loss_scale: LossScaleLike = "identity",
    log: int = 50,
    seed: int = 0,
) -> Loop[StepState, Any]:
    """Makes a loop for supervised training.

    Args:
        model: See `train_step`.
        loss: See `train_step`. The metric "loss" is its exact average over the epoch.
        optimizer: See `train_step`.
        loss_scale: See `train_step`.
        log: The number of iterations between two progress lines. The loop also prints a line at
            the end of each epoch, and a line at the end of the run that says how the time was
            spent. 0 prints nothing.
        seed: See `train_step`.

    Returns:
        A loop whose `Loop.run` returns the trained model in the form that its framework uses, such
        as the variables of a Linen module or a new NNX module. It is returned and validated with
        the parameters that the optimizer updates. For the averages of
        `optax.contrib.schedule_free`, call `optax.contrib.schedule_free_eval_params` with the
        final state's ``optimizer_state[0]``. With `optax.contrib.sam` in its transparent mode,
        the parameters are perturbed between two synchronizations.

    Raises:
        ModelError: The model is of an unknown kind.
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
        raise ArgumentTypeError(
            f"trainer: log must be a whole number, got {log!r}",
            fix="pass the number of iterations between two lines, or 0 for none",
        )
    if log < 0:
        raise ArgumentError(
            f"trainer: log must be at least 0, got {log}",
            fix="pass the number of iterations between two lines, or 0 for none",
        )
    adapter = adapt(model)  # once, so that a later change of the module changes nothing
    init_fn, step_fn = make_train_step(adapter, loss, optimizer, loss_scale=loss_scale, seed=seed)

    def output(state: State[StepState]) -> Any:
        return adapter.export(state.step_state["model_state"])

    loop: Loop[StepState, Any] = Loop(
        step_fn,
        init_fn,
        output,
        metrics=(declare_batch_mean("loss", "loss"),),
        task=SupervisedTask(adapter, loss),
    )
    return log_progress(loop, log) if log else loop


def evaluator(model: ModelLike) -> Loop[StepState, dict[str, Any]]:
    """Makes a loop for supervised evaluation.

    Args:
        model: See `train_step`.

    Returns:
        A loop whose ``run(data, model_state)`` returns the metrics as ``{name: value}``. The model
        state is the whole of what the trainer returns. An NNX or Equinox module holds its state,
        so you may omit it to evaluate the module as it is. A model that draws random numbers in
        evaluation too gets a fixed key.

    Raises:
        ModelError: The model is of an unknown kind. Raised by `run` if the model state lacks a
            part, or does not fit the model.
        ArgumentError: Raised by `run` without a model state.

    Example:
        >>> import jax.numpy as jnp
        >>> model = (lambda key, x: jnp.ones((1, 1)), lambda w, x: x @ w)
        >>> x = jnp.ones((4, 1))
        >>> out = evaluator(model).metric("mean_absolute_error").run([(x, 3 * x)], jnp.ones((1, 1)))
        >>> float(out["mean_absolute_error"])
        2.0
    """
    adapter = adapt(model)
    init_fn, step_fn = make_eval_step(adapter)

    def output(state: State[StepState]) -> dict[str, Any]:
        if state.status == "interrupted":
            # Metrics over a part of the data would look like metrics over all of it.
            raise Interrupted(f"the evaluation was interrupted by {state.halted_by}")
        return dict(state.history[max(state.history)]) if state.history else dict(state.metrics)

    return Loop(step_fn, init_fn, output, task=SupervisedTask(adapter))
