"""Supervised loops (`trainer`, `evaluator`), and the step functions behind them.

    loop = trainer(model, "softmax_cross_entropy_with_integer_labels", "adam").metric("accuracy")
    model_state = loop.run(batches((x, y), 32), epochs=10)
    values = evaluator(model).metric("accuracy").run(batches((x, y), 32), model_state)

Invariant: a factory checks its arguments when you call it, before any data are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from jaxloop._core.interrupts import Interrupted
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop._loop import Loop
from jaxloop._supervised.fields import Field, InputFields
from jaxloop._supervised.loss_scale import LossScaleLike
from jaxloop._supervised.models import ModelLike
from jaxloop._supervised.reports import Report
from jaxloop._supervised.steps import CriterionLike, make_evaluation, make_training
from jaxloop._supervised.training import EvalParamsFn
from jaxloop.errors import ArgumentError, ArgumentTypeError
from jaxloop.handlers.progress import progress
from jaxloop.losses import Objective
from jaxloop.metrics.declare import MetricSpec, declare_batch_mean
from jaxloop.metrics.scalars import EACH_VALUE
from jaxloop.optimizers import OptimizerLike

InitFn: TypeAlias = Callable[[PyTree, PyTree], PyTree]
"""``(batch, init_state) -> step_state``."""

StepState: TypeAlias = dict[str, PyTree]
"""The step state of a supervised loop."""

StepFn: TypeAlias = Callable[[PyTree, PyTree], PyTree]
"""``(batch, step_state) -> step_state``, or the result of `jaxloop.emit`."""


def train_step(
    model: ModelLike,
    loss: CriterionLike,
    optimizer: OptimizerLike,
    *,
    inputs: InputFields = None,
    targets: Field = None,
    weights: Field = None,
    rngs: Sequence[str] = (),
    report: Sequence[Report] = (),
    loss_scale: LossScaleLike = "identity",
    accumulate_gradients: int = 1,
    ema_decay: float | None = None,
    seed: int = 0,
) -> tuple[InitFn, StepFn]:
    """Makes the ``(init_fn, step_fn)`` of supervised training.

    Args:
        model: A Flax Linen, Flax NNX or Equinox module, a transformed Haiku function, a `Model`, a
            pair ``(init, apply)``, or a tuple, list or dict of models. NNX modules that share a
            variable must be parts of one module, such as an `nnx.Dict`. A Linen module or a Haiku
            function learns from a flag whether it trains: ``train``, ``training``,
            ``deterministic``, ``use_running_average`` or, for Haiku, ``is_training``.
        loss: A name, a function of ``(y_true, y_pred)``, a loss of Optax (also inside
            `functools.partial`, `jax.jit` or `functools.wraps`), a list of ``(loss, weight)``, or
            an `objective`. A plain loss gets predictions and targets in float32 or wider. A label
            that is not a class is an error in the first batch, and makes loss and gradient NaN
            later.
        optimizer: An `optax.GradientTransformation` or a name. `jaxloop.optimizers.get` makes one
            by name with another learning rate or a `jaxloop.optimizers.schedule`. Its update gets
            those of these arguments that it takes: ``value``, the loss; ``grad``, the gradients;
            ``value_fn`` and ``obj_fn``, the loss of this batch as a function of the parameters;
            ``grad_fn``, its gradients as a function of the parameters and a number, which is
            ignored.
        inputs: What the model gets: a name in the batch, a function of the batch, a tuple of these
            for several positional inputs, or a dict for keyword inputs. Without ``inputs``, a batch
            is ``(x, y)`` or ``(x, y, sample_weight)``. An `objective` reads the batch itself, and
            ``inputs`` only says how to initialize the model without running it.
        targets: The targets of a plain loss: a name, or a function of the batch.
        weights: The weights or the mask: a name, or a function of the batch. Their shape is
            ``(batch,)``, or any leading part of the shape of the targets, such as
            ``(batch, time)``. They weight the loss and all metrics.
        rngs: The names of random streams of a Linen module. jaxloop finds the names itself, except
            for a module that asks whether a stream exists before it draws. The key of each is made
            from its name and the number of the step.
        report: What to report besides: "gradient_norm" (before clipping, and without the loss
            scale), "update_norm", "parameter_norm" (after the update), "learning_rate" (the one
            that this step used, for an optimizer made with `optax.inject_hyperparams`), "gradients"
            and "updates". What is not named is not computed.
        loss_scale: "identity", "static", "dynamic", or ``(init, scale, unscale)``. Except for
            "identity", a step whose loss or gradients are not finite changes only the scale, and
            no metric counts its examples.
        accumulate_gradients: The number of parts into which the step splits each batch, to save
            memory. The result is that of the whole batch up to rounding, except for a model that
            mixes examples, as batch normalization does.
        ema_decay: The decay of an exponential moving average of the parameters, which starts at
            the initial parameters. None keeps no average.
        seed: The seed of the initial parameters and of all random numbers.

    Returns:
        ``init_fn(batch, init_state)`` and ``step_fn(batch, step_state)``, which returns an
        `Emission`: ``.state`` is the next step state, and ``.outputs`` a dict of what is reported.
        The step state is a dict of ``model_state``, ``optimizer_state`` (exactly the optimizer's),
        ``learning_rate_scale``, ``loss_scale_state``, ``key``, ``num_steps`` and, with
        ``ema_decay``, ``ema_params``. A plain loss reports ``loss``, ``y_true``, ``y_pred`` and, if
        there are weights, ``sample_weight``; an objective reports ``loss`` and its own values. An
        example of weight 0 changes neither loss nor gradients, whatever its target is. NaN and
        infinity in its inputs are replaced before the model sees them. A model that mixes examples
        still sees its finite inputs.

    Raises:
        ModelError: The model is of an unknown kind. Raised by the step if a forward pass changes
            the structure of its state.
        UnknownNameError: The loss, the optimizer, the loss scale or a report is unknown. Raised by
            the step if a batch has no part of a name.
        ArgumentError: Raised by the step if the optimizer needs other arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> model = (lambda key, x: jnp.zeros((2, 1)), lambda w, x: x @ w)
        >>> init_fn, step_fn = train_step(model, "mean_squared_error", "sgd")
        >>> batch = (jnp.ones((4, 2)), jnp.ones((4, 1)))
        >>> result = step_fn(batch, init_fn(batch, None))
        >>> float(result.outputs["loss"]), int(result.state["num_steps"])
        (1.0, 1)
    """
    made = make_training(
        model,
        loss,
        optimizer,
        inputs=inputs,
        targets=targets,
        weights=weights,
        rngs=rngs,
        report=report,
        loss_scale=loss_scale,
        accumulate_gradients=accumulate_gradients,
        ema_decay=ema_decay,
        seed=seed,
    )

    def init(batch: PyTree, init_state: PyTree = None) -> PyTree:
        return made.init_fn(batch, init_state)

    return init, made.step_fn


def eval_step(
    model: ModelLike,
    loss: CriterionLike | None = None,
    *,
    inputs: InputFields = None,
    targets: Field = None,
    weights: Field = None,
    rngs: Sequence[str] = (),
) -> tuple[InitFn, StepFn]:
    """Makes the ``(init_fn, step_fn)`` of supervised evaluation.

    Args:
        model: See `train_step`.
        loss: See `train_step`. None evaluates the predictions alone.
        inputs: See `train_step`.
        targets: See `train_step`.
        weights: See `train_step`.
        rngs: See `train_step`.

    Returns:
        ``init_fn(batch, model_state)`` and ``step_fn(batch, step_state)``. The step reports what
        that of `train_step` reports. See `evaluator` for the model state.

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
    made = make_evaluation(model, loss, inputs=inputs, targets=targets, weights=weights, rngs=rngs)
    return made.init_fn, made.step_fn


def trainer(
    model: ModelLike,
    loss: CriterionLike,
    optimizer: OptimizerLike,
    *,
    inputs: InputFields = None,
    targets: Field = None,
    weights: Field = None,
    rngs: Sequence[str] = (),
    report: Sequence[Report] = (),
    loss_scale: LossScaleLike = "identity",
    accumulate_gradients: int = 1,
    ema_decay: float | None = None,
    eval_params: EvalParamsFn | None = None,
    log: int = 50,
    seed: int = 0,
) -> Loop[StepState, Any]:
    """Makes a loop for supervised training.

    Args:
        model: See `train_step`.
        loss: See `train_step`. The metric "loss" is its exact average over the epoch.
        optimizer: See `train_step`.
        inputs: See `train_step`.
        targets: See `train_step`.
        weights: See `train_step`.
        rngs: See `train_step`.
        report: See `train_step`. To see a value, attach it: ``.metric("gradient_norm")``. The norms
            and the learning rate are values of a step, so they are averaged by batch.
        loss_scale: See `train_step`.
        accumulate_gradients: See `train_step`.
        ema_decay: See `train_step`.
        eval_params: ``step_state -> params`` says which parameters are validated and returned. By
            default, they are the average if ``ema_decay`` is given, or those that the optimizer
            updates. Checkpoints hold everything.
        log: Shows progress and a summary, as `Loop.progress` does. Where that writes lines, this is
            the number of iterations between two of them. 0 shows nothing.
        seed: See `train_step`.

    Returns:
        A loop whose `Loop.run` returns the trained model in the form that its framework uses, such
        as the variables of a Linen module or a new NNX module. What is returned is what `validate`
        evaluates. For the averages of `optax.contrib.schedule_free`, pass an ``eval_params`` that
        calls `optax.contrib.schedule_free_eval_params` with ``step_state["optimizer_state"]``. With
        `optax.contrib.sam` in its transparent mode, the parameters are perturbed between two
        synchronizations.

    Raises:
        ModelError: The model is of an unknown kind.
        UnknownNameError: The loss, the optimizer, the loss scale or a report is unknown. Raised by
            `run` if a batch has no part of a name.
        DataError: Raised by `run` if the batches are no pairs or triples and nothing says what they
            hold, or if the data are padded and the step has no weights.

    Example:
        >>> import jax.numpy as jnp
        >>> model = (lambda key, x: jnp.zeros((1, 1)), lambda w, x: x @ w)
        >>> x = jnp.linspace(-1.0, 1.0, 32)[:, None]
        >>> w = trainer(model, "mean_squared_error", "sgd", log=0).run([(x, 2 * x)], epochs=500)
        >>> round(float(w[0, 0]), 1)
        1.9
    """
    _check_log(log)
    made = make_training(
        model,
        loss,
        optimizer,
        inputs=inputs,
        targets=targets,
        weights=weights,
        rngs=rngs,
        report=report,
        loss_scale=loss_scale,
        accumulate_gradients=accumulate_gradients,
        ema_decay=ema_decay,
        eval_params=eval_params,
        seed=seed,
    )
    task = made.task

    def output(state: State[StepState]) -> Any:
        return task.adapter.export(task.model_state(state.step_state))

    loop: Loop[StepState, Any] = Loop(
        made.step_fn,
        made.init_fn,
        output,
        metrics=(declare_batch_mean("loss", "loss"),),
        task=task,
    )
    return progress(loop, every=log) if log else loop


def _check_log(log: object) -> None:
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


def evaluator(
    model: ModelLike,
    loss: CriterionLike | None = None,
    *,
    inputs: InputFields = None,
    targets: Field = None,
    weights: Field = None,
    rngs: Sequence[str] = (),
) -> Loop[StepState, dict[str, Any]]:
    """Makes a loop for supervised evaluation.

    Args:
        model: See `train_step`.
        loss: See `train_step`. The loop then has the metric "loss", its average over the data. With
            an `objective`, it also has a metric for each scalar that the objective reports, and for
            each value with one number per example.
        inputs: See `train_step`.
        targets: See `train_step`.
        weights: See `train_step`.
        rngs: See `train_step`.

    Returns:
        A loop whose ``run(data, model_state)`` returns the metrics as ``{name: value}``. The model
        state is the whole of what the trainer returns. An NNX or Equinox module holds its state,
        so you may omit it to evaluate the module as it is. A model that draws random numbers in
        evaluation too gets the same key for the same batch.

    Raises:
        ModelError: The model is of an unknown kind. Raised by `run` if the model state lacks a
            part, or does not fit the model.
        ArgumentError: Raised by `run` without a model state.

    Example:
        >>> import jax.numpy as jnp
        >>> model = (lambda key, x: jnp.ones((1, 1)), lambda w, x: x @ w)
        >>> x = jnp.ones((4, 1))
        >>> loop = evaluator(model, "mean_squared_error").metric("mean_absolute_error")
        >>> out = loop.run([(x, 3 * x)], jnp.ones((1, 1)))
        >>> float(out["loss"]), float(out["mean_absolute_error"])
        (4.0, 2.0)
    """
    made = make_evaluation(model, loss, inputs=inputs, targets=targets, weights=weights, rngs=rngs)

    def output(state: State[StepState]) -> dict[str, Any]:
        if state.status == "interrupted":
            # Metrics over a part of the data would look like metrics over all of it.
            raise Interrupted(f"the evaluation was interrupted by {state.halted_by}")
        return dict(state.history[max(state.history)]) if state.history else dict(state.metrics)

    metrics: tuple[MetricSpec, ...] = () if loss is None else (declare_batch_mean("loss", "loss"),)
    if isinstance(loss, Objective):
        metrics = (*metrics, EACH_VALUE)  # of the values in its dict
    return Loop(made.step_fn, made.init_fn, output, metrics=metrics, task=made.task)
