"""The supervised steps: a model, a loss and an optimizer as ``(init_fn, step_fn)`` and a task.

    made = make_training(model, "mean_squared_error", "adam")
    state = made.init_fn(batch, None)
    state = made.step_fn(batch, state).state

Invariant: every argument is checked here, before any data are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from jaxloop import losses, optimizers
from jaxloop._core.batch import Signature
from jaxloop._core.checks import as_number, check_callable, check_count
from jaxloop._core.step_result import Emission
from jaxloop._core.types import PyTree
from jaxloop._supervised import loss_scale as loss_scales
from jaxloop._supervised.criterion import Criterion, PlainLoss
from jaxloop._supervised.evaluation import StepFn, check_given, evaluation_steps
from jaxloop._supervised.fields import BatchFields, Field, InputFields
from jaxloop._supervised.init import Evidence, SupervisedInit
from jaxloop._supervised.loss_scale import LossScaleLike
from jaxloop._supervised.models import ModelAdapter, ModelLike, adapt, merge_state
from jaxloop._supervised.objective import ObjectiveCriterion
from jaxloop._supervised.prediction import Predictions, state_like
from jaxloop._supervised.reports import Report, check_report
from jaxloop._supervised.task import SupervisedTask
from jaxloop._supervised.training import EvalParamsFn, Training
from jaxloop.errors import ArgumentError, ArgumentTypeError
from jaxloop.losses import LossLike, Objective
from jaxloop.optimizers import OptimizerLike

CriterionLike: TypeAlias = LossLike | Objective
"""A loss: a name, a function, one of Optax's, a list of ``(loss, weight)``, or an objective."""


class SupervisedSteps(NamedTuple):
    """The functions of a supervised loop, and how to evaluate its model."""

    init_fn: SupervisedInit
    step_fn: StepFn
    task: SupervisedTask


def criterion_of(loss: CriterionLike | None, fields: BatchFields) -> Criterion:
    """Returns the criterion for a loss or an objective."""
    if isinstance(loss, Objective):
        return ObjectiveCriterion(loss, fields)
    return PlainLoss(None if loss is None else losses.get(loss), fields)


def make_training(
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
    seed: int = 0,
) -> SupervisedSteps:
    """Makes the init function and the step of `jaxloop.trainer`."""
    check_count("accumulate_gradients", accumulate_gradients, at_least=1, where="trainer")
    if loss is None:
        raise ArgumentTypeError(
            "trainer: loss must be a loss, got None", fix="pass a loss, such as optax.l2_loss"
        )
    _check_decay(ema_decay)
    if eval_params is not None:
        check_callable("trainer", "eval_params", eval_params)
    elif ema_decay is not None:
        eval_params = _ema_params
    adapter = adapt(model, _names(rngs))  # once, so that a later change of it changes nothing
    criterion = criterion_of(loss, BatchFields(inputs, targets, weights))
    training = Training(
        adapter,
        criterion,
        optimizers.get(optimizer),
        loss_scales.get(loss_scale),
        skips_overflow=loss_scale != "identity",
        report=check_report(report),
        ema_decay=ema_decay,
        num_micro_batches=int(accumulate_gradients),
    )

    def init_fn(batch: PyTree, prepared: PyTree) -> tuple[PyTree, Evidence | None]:
        return training.init(batch, prepared, jax.random.key(seed))

    def step_fn(batch: PyTree, step_state: PyTree) -> Emission:
        return training.step(batch, step_state)

    plain = criterion.loss if isinstance(criterion, PlainLoss) else None
    return SupervisedSteps(
        SupervisedInit(init_fn, adapter.load, plain),
        step_fn,
        SupervisedTask(
            adapter,
            criterion,
            loss,
            eval_params,
            type(model).__name__,
            training.report,
            trains=True,
            learning_rate=optimizers.default_rate(optimizer),
        ),
    )


def make_evaluation(
    model: ModelLike | ModelAdapter,
    loss: CriterionLike | None = None,
    *,
    inputs: InputFields = None,
    targets: Field = None,
    weights: Field = None,
    rngs: Sequence[str] = (),
) -> SupervisedSteps:
    """Makes the init function and the step of `jaxloop.evaluator`."""
    adapter = adapt(model, _names(rngs))
    criterion = criterion_of(loss, BatchFields(inputs, targets, weights))
    task = SupervisedTask(adapter, criterion, loss, None, type(model).__name__)
    return SupervisedSteps(*task.eval_steps(), task)


class PredictionSteps(NamedTuple):
    """How to predict with a model.

    Attributes:
        whole_state: ``(signature of a batch, given) -> model_state``.
        predict: ``(batch, model_state, number) -> prediction``, a compiled function of a batch and
            its number in the data.
        num_examples: ``signature of a batch -> number``, or None if the first axes of the inputs
            differ.
    """

    whole_state: Callable[[Signature, Any], PyTree]
    predict: Callable[[PyTree, PyTree, Any], PyTree]
    num_examples: Callable[[Signature], int | None]


def make_prediction(
    model: ModelLike, inputs: InputFields = None, rngs: Sequence[str] = ()
) -> PredictionSteps:
    """Makes the functions of `jaxloop.predictor`, which are those of an evaluation."""
    adapter, kind = adapt(model, _names(rngs)), type(model).__name__
    criterion = Predictions(BatchFields(inputs))
    _, step_fn = evaluation_steps(adapter, criterion, kind)

    @functools.lru_cache(maxsize=8)
    def like(batch: Signature) -> PyTree:
        return state_like(adapter, criterion, batch)

    def whole(batch: Signature, given: Any) -> PyTree:
        prepared = adapter.load(given)
        check_given(adapter, kind, prepared)
        return merge_state(like(batch), prepared, "model_state", complete=not adapter.holds_state)

    def predict(batch: PyTree, model_state: PyTree, number: Any) -> PyTree:
        step_state = {"model_state": model_state, "num_steps": number}
        return step_fn(batch, step_state).outputs["y_pred"]

    num_examples = functools.lru_cache(maxsize=8)(criterion.num_examples)
    return PredictionSteps(whole, jax.jit(predict), num_examples)


def _ema_params(step_state: dict[str, PyTree]) -> PyTree:
    return step_state["ema_params"]


def _check_decay(decay: Any) -> None:
    if decay is None:
        return
    number = as_number(decay)
    if number is None:
        raise ArgumentTypeError(
            f"trainer: ema_decay must be a number, got {decay!r}", fix="pass a decay such as 0.999"
        )
    if not 0 <= number < 1:
        raise ArgumentError(
            f"trainer: ema_decay must be at least 0 and less than 1, got {decay}",
            fix="pass a decay such as 0.999",
        )


def _names(rngs: Sequence[str]) -> tuple[str, ...]:
    if isinstance(rngs, str) or not all(isinstance(name, str) for name in rngs):
        raise ArgumentTypeError(
            f"rngs must be a tuple of names, got {rngs!r}",
            fix="pass the names of random streams, such as rngs=('dropout', 'noise')",
        )
    return tuple(rngs)
