"""Builder methods keep the type of their loop, and take all that the documentation names."""

from typing import assert_type

import jax
import jax.numpy as jnp

import jaxloop as jl


def step(batch: jax.Array, total: jax.Array) -> jax.Array:
    return total + jnp.sum(batch)


def message(snapshot: jl.Snapshot) -> str:
    return f"epoch {snapshot.epoch}"


loop = jl.loop(step)
chained = (
    loop.metric("accuracy")
    .metric("mean_squared_error", "mse")
    .metric(lambda x: x, "mean", None, ["x"])
    .metric("loss", accumulate=jl.window(100))
    .derive("error", lambda accuracy: 1 - accuracy, of="accuracy")
    .derive("both", lambda a, b: [a, b], of=("accuracy", "mse"))
    .metric(jl.metrics.top_k_categorical_accuracy(k=3), "top", "running_average")
    .log(message, event="epoch_completed")
    .progress(every=10, plot=False)
    .early_stop("mean", mode="max", patience=2, restore_best=True)
    .early_stop("accuracy", mode="auto")
    .early_stop("mse", mode=lambda new, best: bool(new < best), event=jl.Event.EPOCH_COMPLETED)
    .reduce_lr_on_plateau("mean", factor=0.5, filter=jl.every(2), cooldown=1)
    .checkpoint("checkpoints", criteria="mean", mode="min", keep=None, keep_best=2)
    .nan_guard("skip")
    .resume("checkpoints")
)
assert_type(chained, jl.Loop[jax.Array, jl.State[jax.Array]])
assert_type(chained.run([1.0], jnp.zeros(())), jl.State[jax.Array])

again = loop.from_state(loop.run([1.0], jnp.zeros(())))
assert_type(again.run([1.0]), jl.State[jax.Array])
