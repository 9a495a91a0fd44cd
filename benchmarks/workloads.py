"""The workloads of the benchmarks. Every case uses the same data, model, optimizer and loss.

    work = WORKLOADS["MLP 64-64-10"]()
    state = work.init()
    state, loss = work.step((x, y), state)

Each workload trains a classifier with Adam on the mean cross entropy, in plain JAX and Optax.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxloop as jl
from benchmarks import perceptron
from benchmarks.perceptron import TX, dense


@dataclasses.dataclass(frozen=True)
class Workload:
    """Arrays in memory, a model, and the number of epochs of one measurement."""

    kind: str
    sizes: tuple[int, ...]
    x: np.ndarray
    y: np.ndarray
    batch_size: int
    epochs: int
    init_params: Callable[[], Any]
    apply: Callable[[Any, Any], Any]

    def init(self):
        """Returns an initial state on the host."""
        params = self.init_params()
        return jax.tree.map(np.asarray, {"params": params, "opt": TX.init(params)})

    def losses(self, params, batch):
        """Returns the loss of each example."""
        return perceptron.losses_of(self.apply, params, batch)

    def step(self, batch, state):
        """Runs one step; returns the new state and the loss."""
        return perceptron.train_step(batch, state, self.apply)

    @cached_property
    def batches(self):
        """The batches of one epoch, as a list."""
        return list(jl.batches((self.x, self.y), self.batch_size, drop_remainder=True))

    @property
    def num_steps(self):
        """The number of steps of one measurement."""
        return len(self.batches) * self.epochs


def mlp(sizes, batch_size, num_batches, epochs):
    """Returns a perceptron on random numbers, or on the digits if it has 64 inputs."""
    rng = np.random.default_rng(0)
    if sizes[0] == 64:
        (x, y), _ = jl.datasets.digits()
        x, y = x.reshape(len(x), 64), y.astype(np.int32)
    else:
        x = rng.normal(size=(num_batches * batch_size, sizes[0])).astype(np.float32)
        y = rng.integers(0, sizes[-1], len(x)).astype(np.int32)
    params = partial(perceptron.init_params, sizes)
    return Workload("mlp", sizes, x, y, batch_size, epochs, params, perceptron.apply)


def _conv(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _pool(x):
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def _cnn_params():
    rng = np.random.default_rng(0)
    return {
        "c1": dense(rng, (3, 3, 1, 8)),
        "c2": dense(rng, (3, 3, 8, 16)),
        "w": dense(rng, (784, 10)),
        "b": np.zeros(10, np.float32),
    }


def _cnn_apply(params, x):
    x = _pool(jax.nn.relu(_conv(x, params["c1"])))
    x = _pool(jax.nn.relu(_conv(x, params["c2"])))
    return x.reshape(len(x), -1) @ params["w"] + params["b"]


def cnn(batch_size, num_batches, epochs):
    """Returns a small convolutional network on images of 28 by 28 pixels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_batches * batch_size, 28, 28, 1)).astype(np.float32)
    y = rng.integers(0, 10, len(x)).astype(np.int32)
    return Workload("cnn", (), x, y, batch_size, epochs, _cnn_params, _cnn_apply)


VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 64, 32, 4, 2, 32


def _transformer_params():
    rng = np.random.default_rng(0)
    layers = [
        {
            "qkv": dense(rng, (WIDTH, 3 * WIDTH)),
            "out": dense(rng, (WIDTH, WIDTH)),
            "up": dense(rng, (WIDTH, 4 * WIDTH)),
            "down": dense(rng, (4 * WIDTH, WIDTH)),
        }
        for _ in range(LAYERS)
    ]
    return {
        "embed": dense(rng, (VOCABULARY, WIDTH)),
        "place": dense(rng, (LENGTH, WIDTH)),
        "head": dense(rng, (WIDTH, 10)),
        "layers": layers,
    }


def _norm(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def _transformer_apply(params, tokens):
    x = params["embed"][tokens] + params["place"]
    for layer in params["layers"]:
        q, k, v = jnp.split(_norm(x) @ layer["qkv"], 3, -1)
        q, k, v = (a.reshape(*a.shape[:2], HEADS, -1) for a in (q, k, v))
        x = x + jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(_norm(x) @ layer["up"]) @ layer["down"]
    return x.mean(1) @ params["head"]


def transformer(batch_size, num_batches, epochs):
    """Returns a small transformer that classifies sequences of tokens."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, VOCABULARY, (num_batches * batch_size, LENGTH)).astype(np.int32)
    y = rng.integers(0, 10, len(x)).astype(np.int32)
    return Workload(
        "transformer", (), x, y, batch_size, epochs, _transformer_params, _transformer_apply
    )


WORKLOADS = {
    "MLP 8-8-2": lambda: mlp((8, 8, 2), 8, 400, 5),
    "MLP 64-64-10": lambda: mlp((64, 64, 10), 32, 44, 20),
    "MLP 784-256-10": lambda: mlp((784, 256, 10), 128, 40, 3),
    "CNN 28x28": lambda: cnn(32, 20, 6),
    "transformer": lambda: transformer(16, 30, 3),
}
