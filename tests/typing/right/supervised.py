"""Objectives, and the arguments of the supervised factories."""

from typing import Any

import jax
import jax.numpy as jnp

import jaxloop as jl


@jl.objective
def plain(model: Any, batch: dict[str, jax.Array]) -> jax.Array:
    return jnp.square(model(batch["x"]) - batch["y"])


@jl.objective(key=True, train=True)
def noisy(
    model: Any, batch: dict[str, jax.Array], *, key: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    noise = jax.random.normal(key, batch["x"].shape) if train else jnp.zeros(())
    error = model(batch["x"] + noise) - batch["y"]
    return jnp.square(error), {"error": error}


def params_of(step_state: dict[str, Any]) -> Any:
    return step_state["ema_params"]


pair = (lambda key, x: jnp.zeros(()), lambda w, x: w * x)
loop = jl.trainer(
    pair,
    noisy,
    "adam",
    weights="mask",
    report=("gradient_norm", "learning_rate"),
    accumulate_gradients=2,
    ema_decay=0.99,
    eval_params=params_of,
)
chained = loop.metric("error").metric("gradient_norm").validate([{"x": jnp.ones(4)}])
output: Any = chained.run([{"x": jnp.ones(4), "y": jnp.ones(4)}], epochs=2)

named = jl.trainer(
    pair,
    "mean_squared_error",
    "sgd",
    inputs={"x": "image"},
    targets=lambda batch: batch["label"],
)
values: dict[str, Any] = jl.evaluator(pair, plain).run([{"x": jnp.ones(4)}], jnp.zeros(()))
init_fn, step_fn = jl.train_step(pair, plain, "sgd", inputs=("x", "y"), rngs=("noise",))
