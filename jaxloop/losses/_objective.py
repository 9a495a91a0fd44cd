"""Objectives: losses that have their model in hand.

    @objective
    def regularized(model, batch):
        x, y = batch
        penalty = 1e-4 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(model.params))
        return mean_squared_error(y, model(x)) + penalty, {"penalty": penalty}

This file only marks such a function. The trainer and the evaluator call it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, overload

from jaxloop._core.checks import check_callable, name_of

ObjectiveFn: TypeAlias = Callable[..., Any]
"""``(model, batch) -> loss`` or ``(model, batch) -> (loss, {name: value})``."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A function ``(model, batch) -> loss``, made by `objective`. You can call it.

    Attributes:
        fn: The function.
        key: Whether it takes ``key=``.
        train: Whether it takes ``train=``.
    """

    fn: ObjectiveFn
    key: bool = False
    train: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    @property
    def name(self) -> str:
        """The name of the function."""
        return name_of(self.fn)


@overload
def objective(fn: ObjectiveFn, /) -> Objective: ...


@overload
def objective(*, key: bool = False, train: bool = False) -> Callable[[ObjectiveFn], Objective]: ...


@overload
def objective(fn: ObjectiveFn, /, *, key: bool = False, train: bool = False) -> Objective: ...


def objective(
    fn: ObjectiveFn | None = None, /, *, key: bool = False, train: bool = False
) -> Objective | Callable[[ObjectiveFn], Objective]:
    """Marks a function of a model and a batch as a loss.

    Use the result wherever a loss is taken. The trainer computes the gradients with respect to the
    model's parameters, carries its other state, and evaluates the same function in `validate`.

    Args:
        fn: ``fn(model, batch)`` returns the loss, or ``(loss, {name: value})``. ``model`` is the
            model at the parameters of this step, in training or evaluation mode: an NNX or Equinox
            module as it is; for Linen and Haiku a callable with the arguments of the module and
            with ``.params``; for Linen also with the module's other methods and
            ``.sown("intermediates")``; for a container of models a container of these. ``batch``
            is a batch of the data, of any structure.

            The loss is one value per example, ``(batch,)``; or a scalar, which counts for all
            examples of the batch; or, together with a ``"sample_weight"`` of its shape in the dict
            or with ``weights=``, one value per element, such as ``(batch, time)``. The weights
            weight the metrics too. Each value in the dict is reported under its name. Report
            ``y_true`` and ``y_pred`` for metrics such as "accuracy".
        key: Whether ``fn`` takes ``key=``, a key of `jax.random`. It is a new one at each step,
            and in an evaluation the same one for the same batch.
        train: Whether ``fn`` takes ``train=``, which is True in training and False in evaluation.

    Returns:
        An `Objective`, or a decorator if you pass no function.

    Raises:
        ArgumentTypeError: ``fn`` is not a function. Raised by `run`, before the first step, if it
            returns anything else.
        ShapeError: Raised by `run` if the loss has another shape.

    Example:
        >>> import jax.numpy as jnp, jaxloop as jl
        >>> @jl.objective
        ... def squared(model, batch):
        ...     return (model(batch["x"]) - batch["y"]) ** 2, {"level": model.params}
        >>> model = (lambda key, x: jnp.zeros(()), lambda w, x: w * x)
        >>> data = [{"x": jnp.ones(4), "y": jnp.full(4, 3.0)}]
        >>> loop = jl.trainer(model, squared, "sgd", log=0)
        >>> round(float(loop.run(data, epochs=200)), 1)
        2.9
    """

    def make(fn: ObjectiveFn) -> Objective:
        if isinstance(fn, Objective):
            fn = fn.fn
        check_callable("objective", "fn", fn)
        return Objective(fn, bool(key), bool(train))

    return make if fn is None else make(fn)
