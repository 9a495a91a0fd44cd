"""Handlers, events and filters that cannot be right."""

import jax
import jax.numpy as jnp

import jaxloop as jl


def step(batch: jax.Array, total: jax.Array) -> jax.Array:
    return total + jnp.sum(batch)


def good(state: jl.State[jax.Array]) -> None: ...


def gives_int(state: jl.State[jax.Array]) -> int:
    return 3


def gives_state(state: jl.State[jax.Array]) -> jl.State[jax.Array]:
    return state


def gives_unknown_status(state: jl.State[jax.Array]) -> tuple[str, jl.State[jax.Array]]:
    return "stop", state


def two_arguments(state: jl.State[jax.Array], other: int) -> None: ...


loop = jl.loop(step)
loop.handle("epoch_complete", good)  # error: arg-type, reportArgumentType
loop.handle(["started", "end"], good)  # error: list-item, reportArgumentType
loop.handle(3, good)  # error: arg-type, reportArgumentType
loop.handle("started", lambda state: 3)  # error: arg-type return-value, reportArgumentType
loop.handle("started", gives_int)  # error: arg-type, reportArgumentType
loop.handle("started", gives_state)  # error: arg-type, reportArgumentType
loop.handle("started", gives_unknown_status)  # error: arg-type, reportArgumentType
loop.handle("started", two_arguments)  # error: arg-type, reportArgumentType
loop.handle("started", "good")  # error: arg-type, reportArgumentType
loop.handle("started", good, filter="sometimes")  # error: arg-type, reportArgumentType
loop.handle("started", good, filter=3)  # error: arg-type, reportArgumentType
loop.handle("started", good, name=3)  # error: arg-type, reportArgumentType
loop.observe("epoch_ended", print)  # error: arg-type, reportArgumentType
loop.monitor("loss", gives_int, name="m")  # error: arg-type, reportArgumentType
jl.every("3")  # error: arg-type, reportArgumentType
jl.every(3, per="run")  # error: arg-type, reportArgumentType
jl.every(3) & 4  # error: operator, reportOperatorIssue
jl.every_secnd(3)  # error: attr-defined, reportAttributeAccessIssue
