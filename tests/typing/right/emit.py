"""A step that reports values carries the same state as one that does not."""

from typing import assert_type

import jax
import jax.numpy as jnp

import jaxloop as jl


def step(batch: jax.Array, total: jax.Array) -> jl.Emission[jax.Array]:
    new = total + jnp.sum(batch)
    return jl.emit(new, loss=new)


assert_type(jl.emit(jnp.zeros(())), jl.Emission[jax.Array])
assert_type(jl.loop(step).run([1.0], jnp.zeros(())), jl.State[jax.Array])
assert_type(jl.loop(step).run([1.0], jnp.zeros(())).step_state, jax.Array)
