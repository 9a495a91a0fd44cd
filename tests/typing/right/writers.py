"""Writers of the user's own, and values for them, have the types that the documentation names."""

from collections.abc import Mapping
from typing import assert_type

import jax
import jax.numpy as jnp

import jaxloop as jl


class Printer:
    def write(self, step: int, values: Mapping[str, jl.writers.Value]) -> None:
        print(step, values)

    def close(self) -> None:
        print("the end")


class Opened:
    def open(self, start: jl.writers.WriterStart) -> Printer:
        print(start.step, start.run_id, start.hyperparameters)
        return Printer()


def values(state: jl.State[jax.Array]) -> dict[str, jl.writers.Image | float]:
    return {"image": jl.writers.Image(jnp.zeros((2, 2))), "total": 1.0}


def draw(batch: tuple[jax.Array, jax.Array], predicted: jax.Array) -> dict[str, jl.writers.Text]:
    return {"sample": jl.writers.Text(str(predicted))}


def step(batch: jax.Array, total: jax.Array) -> jax.Array:
    return total + jnp.sum(batch)


model = (lambda key, x: jnp.ones(1), lambda w, x: w * x)
loop = (
    jl.loop(step)
    .write(Printer())
    .write(Opened(), every=10, hyperparameters={"rate": 0.1})
    .write(jl.writers.csv("metrics.csv"), every=jl.every_seconds(10))
    .write(jl.writers.tensorboard("runs/a"), values=values)
    .write(jl.writers.tensorboard("runs/b"), values=jl.writers.histograms(gradients=True))
    .write(jl.writers.jsonl("a.jsonl"), values=jl.writers.predictions(model, [1.0], draw))
    .write(jl.writers.mlflow("a", tracking_uri="sqlite:///a.db"), name="mine")
    .write(jl.writers.wandb("a", mode="offline"))
    .write(jl.writers.trackio("a"))
)
assert_type(loop, jl.Loop[jax.Array, jl.State[jax.Array]])
