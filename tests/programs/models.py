"""Models of every kind, and the data and losses to train them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxloop as jl

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 6)).astype(np.float32)
Y = RNG.integers(0, 3, 50).astype(np.int32)
LOSS = optax.softmax_cross_entropy_with_integer_labels


class Linen(nn.Module):
    """With batch statistics and dropout."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(3)(nn.Dropout(0.3, deterministic=not train)(nn.relu(x)))


class Digits(nn.Module):
    """The demo's network."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = x.reshape(x.shape[0], -1)
        for size in (256, 128):
            x = nn.relu(nn.Dense(size)(x))
            x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(10)(x)


class Nnx(nnx.Module):
    """With batch statistics and dropout."""

    def __init__(self, rngs: Any) -> None:
        self.a, self.b = nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.b(self.drop(nnx.relu(self.norm(self.a(x)))))


def linen_model() -> Any:
    """A Linen module."""
    return Linen()


def digits_model() -> Any:
    """The network of the digits demo."""
    return Digits()


def equinox_model() -> Any:
    """An Equinox network with dropout."""
    import equinox as eqx  # optional

    key = jax.random.key(0)
    return eqx.nn.MLP(6, 3, 8, 1, key=key)


def haiku_model() -> Any:
    """A transformed Haiku function."""
    import haiku as hk  # optional

    return hk.transform(lambda x: hk.Linear(3)(x))


def weights_of(key: Any, x: Any) -> Any:
    """Parameters of a linear model."""
    return jax.random.normal(key, (x.shape[-1], 3))


def plain_data() -> Any:
    """Supervised data with a ragged last batch."""
    return jl.batches((X, Y), 16, shuffle=True)


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "linen": lambda: (Linen(), plain_data()),
    "nnx": lambda: (Nnx(nnx.Rngs(0)), plain_data()),
    "equinox": lambda: (equinox_model(), plain_data()),
    "haiku": lambda: (haiku_model(), plain_data()),
    "pair": lambda: ((weights_of, lambda w, x: x @ w), plain_data()),
    "Model": lambda: (
        jl.Model(
            lambda key, x: (weights_of(key, x), {"calls": jnp.int32(0)}),
            lambda w, s, x, *, train, key: (x @ w, {"calls": s["calls"] + int(train)}),
        ),
        plain_data(),
    ),
    "container": lambda: (
        {"a": nn.Dense(3), "b": Linen()},
        jl.batches((X, {"a": Y, "b": Y}), 16, shuffle=True, seed=2),
    ),
}
OPTIMIZERS = [
    "adabelief",
    "adagrad",
    "adam",
    "adamw",
    "fromage",
    "lamb",
    "noisy_sgd",
    "radam",
    "rmsprop",
    "sgd",
    "yogi",
]


def linear(activation: Callable[[Any], Any], size: int) -> Any:
    """A linear model with an activation."""
    return (
        lambda key, x: 0.1 * jax.random.normal(key, (6, size)),
        lambda w, x: activation(x @ w),
    )


LOSSES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "mean_squared_error": lambda: (X[:, :2], linear(lambda x: x, 2)),
    "mean_absolute_error": lambda: (X[:, :2], linear(lambda x: x, 2)),
    "categorical_cross_entropy": lambda: (
        np.eye(3, dtype=np.float32)[Y],
        linear(jax.nn.softmax, 3),
    ),
    "binary_cross_entropy": lambda: (
        (Y[:, None] > 0).astype(np.float32),
        linear(jax.nn.sigmoid, 1),
    ),
    "softmax_cross_entropy_with_integer_labels": lambda: (Y, linear(lambda x: x, 3)),
    "cosine_similarity": lambda: (X[:, :3], linear(lambda x: x, 3)),
    "kl_divergence": lambda: (np.eye(3, dtype=np.float32)[Y], linear(jax.nn.softmax, 3)),
}
