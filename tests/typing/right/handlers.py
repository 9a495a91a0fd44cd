"""Handlers and observers, of all the shapes that a user may give them."""

from typing import Literal

import jax
import jax.numpy as jnp

import jaxloop as jl


def step(batch: jax.Array, total: jax.Array) -> jax.Array:
    return total + jnp.sum(batch)


def returns_nothing(state: jl.State[jax.Array]) -> None:
    print(state.epoch, state.step_state + 1)


def may_halt(state: jl.State[jax.Array]) -> tuple[jl.Status, jl.State[jax.Array]] | None:
    return (jl.Status.HALT_LOOP, state) if state.step > 5 else None


def by_name(state: jl.State[jax.Array]) -> tuple[Literal["halt_epoch"], jl.State[jax.Array]]:
    return "halt_epoch", state


def changes(state: jl.State[jax.Array]) -> jl.handlers.HandlerResult[jax.Array]:
    return "continue", state.replace(metrics={**state.metrics, "a": 1})


def observer(snapshot: jl.Snapshot) -> None:
    print(snapshot.metrics, snapshot.history, snapshot.times)


loop = (
    jl.loop(step)
    .handle("started", returns_nothing)
    .handle(jl.Event.EPOCH_COMPLETED, may_halt, "once", name="mine")
    .handle(["iteration_started", jl.Event.ITERATION_COMPLETED], by_name, jl.every(3))
    .handle("all", changes, {"every": 2, "after": 10})
    .handle("iteration_completed", lambda state: None, jl.every(2) & ~jl.after(3) | jl.only(9))
    .handle("iteration_completed", lambda state: ("halt_loop", state), lambda state: state.step > 3)
    .observe("epoch_completed", observer)
    .observe("all", lambda snapshot: print(snapshot.step), jl.every_seconds(1.0))
    .observe("iteration_completed", observer, lambda snapshot: snapshot.step > 3)
    .monitor("loss", may_halt, name="m", mode="max")
)
