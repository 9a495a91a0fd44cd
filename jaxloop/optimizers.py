"""Optimizers by name, and a scale that lets a handler change any optimizer's learning rate.

    optimizer = with_scale(get("adam"))
    state = optax.tree.set(optimizer.init(params), learning_rate_scale=jnp.float32(0.1))

Invariant: a scale of 1 leaves every bit of the updates unchanged.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentTypeError, unknown_name


class Optimizer(Protocol):
    """Two pure functions, such as those of `optax.GradientTransformation` or `optax.MultiSteps`."""

    def init(self, params: PyTree, /) -> PyTree:
        """Returns the initial optimizer state."""

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree = None, /
    ) -> tuple[PyTree, PyTree]:
        """Returns the updates and the next state."""


OptimizerLike: TypeAlias = str | Optimizer
"""A name of `DEFAULT_LEARNING_RATES`, or any optimizer of Optax."""

DEFAULT_LEARNING_RATES: dict[str, float] = {
    "adabelief": 1e-3,
    "adagrad": 1e-3,
    "adam": 1e-3,
    "adamw": 1e-3,
    "fromage": 1e-2,
    "lamb": 1e-2,
    "noisy_sgd": 1e-2,
    "radam": 1e-3,
    "rmsprop": 1e-2,
    "sgd": 1e-2,
    "yogi": 1e-2,
}
"""The named optimizers and their learning rates, which are the defaults of Axon."""


def get(optimizer: OptimizerLike) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer for a name or an Optax transformation.

    Args:
        optimizer: A name of `DEFAULT_LEARNING_RATES`, or any `optax.GradientTransformation`.

    Returns:
        A transformation that takes extra arguments, such as ``value=``.

    Raises:
        UnknownNameError: The name is unknown.
        ArgumentTypeError: ``optimizer`` is neither a name nor a transformation.

    Example:
        >>> get("adm")
        Traceback (most recent call last):
        jaxloop.errors.UnknownNameError: unknown optimizer 'adm'; did you mean 'adam'?...
    """
    if isinstance(optimizer, str):
        if optimizer not in DEFAULT_LEARNING_RATES:
            raise unknown_name("optimizer", optimizer, DEFAULT_LEARNING_RATES)
        rate = DEFAULT_LEARNING_RATES[optimizer]
        # Optax warns if it gets no key for the noise.
        made = optax.noisy_sgd(rate, key=0) if optimizer == "noisy_sgd" else None
        made = made or getattr(optax, optimizer)(rate)
        return optax.with_extra_args_support(made)
    # Only the two functions count, because `optax.MultiSteps` is not a GradientTransformation.
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ArgumentTypeError(
            "an optimizer must be a name or an optax.GradientTransformation, got a "
            f"{type(optimizer).__name__} ({optimizer!r:.80})",
            fix="pass an optimizer such as optax.adam(1e-3), or a name such as 'adam'",
        )
    if not isinstance(optimizer, optax.GradientTransformation):
        optimizer = optax.GradientTransformation(optimizer.init, optimizer.update)
    return optax.with_extra_args_support(optimizer)


class LearningRateScaleState(NamedTuple):
    """The factor for every update, a float32 scalar that starts at 1."""

    learning_rate_scale: jax.Array


def scale_by_learning_rate_scale() -> optax.GradientTransformation:
    """Makes a transformation that multiplies updates by a scale in its state.

    Example:
        >>> scale_by_learning_rate_scale().init(None).learning_rate_scale
        Array(1., dtype=float32)
    """

    def init(params: PyTree) -> LearningRateScaleState:
        del params
        return LearningRateScaleState(jnp.ones((), jnp.float32))

    def update(
        updates: PyTree, state: LearningRateScaleState, params: PyTree = None
    ) -> tuple[PyTree, LearningRateScaleState]:
        del params
        scale = state.learning_rate_scale
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)


def with_scale(
    optimizer: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer followed by `scale_by_learning_rate_scale`.

    Example:
        >>> state = with_scale(get("sgd")).init(jnp.zeros(2))
        >>> float(optax.tree.get(state, "learning_rate_scale"))
        1.0
    """
    return optax.with_extra_args_support(optax.chain(optimizer, scale_by_learning_rate_scale()))
