"""Optimizers by name, and the scale that lets a handler change any optimizer's learning rate.

optimizer = with_scale(get("adam"))
optax.tree.set(state, learning_rate_scale=jnp.float32(0.1))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxloop.errors import ArgumentTypeError, unknown_name

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
"""The optimizers that have a name, with the learning rate that they get (Axon's defaults)."""


def get(optimizer: str | optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer that a name or an Optax transformation means.

    Args:
        optimizer: A name of `DEFAULT_LEARNING_RATES`, or any `optax.GradientTransformation`.

    Returns:
        A transformation that takes extra arguments, such as ``value=``.

    Raises:
        UnknownNameError: The name is unknown.
        ArgumentTypeError: It is neither a name nor a transformation.

    Example:
        >>> get("adm")
        Traceback (most recent call last):
        jaxloop.errors.UnknownNameError: unknown optimizer 'adm'; did you mean 'adam'?...
    """
    if isinstance(optimizer, str):
        if optimizer not in DEFAULT_LEARNING_RATES:
            raise unknown_name("optimizer", optimizer, DEFAULT_LEARNING_RATES)
        rate = DEFAULT_LEARNING_RATES[optimizer]
        # Optax warns where its noise has no key.
        made = optax.noisy_sgd(rate, key=0) if optimizer == "noisy_sgd" else None
        made = made or getattr(optax, optimizer)(rate)
        return optax.with_extra_args_support(made)
    # By its two functions, as `optax.MultiSteps` is no GradientTransformation.
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ArgumentTypeError(
            f"an optimizer cannot be made of a {type(optimizer).__name__} ({optimizer!r:.80})",
            fix="pass an optax.GradientTransformation, such as optax.adam(1e-3), or a name",
        )
    if not isinstance(optimizer, optax.GradientTransformation):
        optimizer = optax.GradientTransformation(optimizer.init, optimizer.update)
    return optax.with_extra_args_support(optimizer)


class LearningRateScaleState(NamedTuple):
    """What every update is multiplied by, a float32 scalar, at first 1."""

    learning_rate_scale: jax.Array


def scale_by_learning_rate_scale() -> optax.GradientTransformation:
    """Multiplies updates by a scale that lives in its state."""

    def init(params: Any) -> LearningRateScaleState:
        del params
        return LearningRateScaleState(jnp.ones((), jnp.float32))

    def update(
        updates: Any, state: LearningRateScaleState, params: Any = None
    ) -> tuple[Any, LearningRateScaleState]:
        del params
        scale = state.learning_rate_scale
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)


def with_scale(
    optimizer: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with its updates scaled last; multiplying by 1 changes no bit."""
    return optax.with_extra_args_support(optax.chain(optimizer, scale_by_learning_rate_scale()))
