"""The perceptron of the benchmarks in plain JAX and Optax, for code that must not import jaxloop.

params = init_params((64, 64, 10))
state = {"params": params, "opt": TX.init(params)}
state, loss = train_step(batch, state)
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

TX = optax.adam(1e-3)


def dense(rng, shape):
    """Returns random weights whose variance is one over the number of inputs."""
    return (rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)


def init_params(sizes):
    """Returns the parameters on the host."""
    rng = np.random.default_rng(0)
    return [
        {"w": dense(rng, (a, b)), "b": np.zeros(b, np.float32)}
        for a, b in zip(sizes, sizes[1:], strict=False)
    ]


def apply(params, x):
    """Returns the logits."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def losses_of(apply_fn, params, batch):
    """Returns the cross entropy of each example."""
    x, y = batch
    logits = jax.nn.log_softmax(apply_fn(params, x))
    return -jnp.take_along_axis(logits, y[:, None], 1)[:, 0]


def train_step(batch, state, apply_fn=apply):
    """Runs one step; returns the new state and the loss."""
    loss, grads = jax.value_and_grad(lambda p: losses_of(apply_fn, p, batch).mean())(
        state["params"]
    )
    updates, opt = TX.update(grads, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss


def random_batches(sizes, batch_size, num_batches):
    """Returns pairs of float32 inputs and int32 classes, as NumPy arrays."""
    rng = np.random.default_rng(0)
    return [
        (
            rng.normal(size=(batch_size, sizes[0])).astype(np.float32),
            rng.integers(0, sizes[-1], batch_size).astype(np.int32),
        )
        for _ in range(num_batches)
    ]
