"""Wrong uses of a typed state."""

import jax
import jax.numpy as jnp

import jaxloop as jl


def step(batch: jax.Array, total: jax.Array) -> jax.Array:
    return total + jnp.sum(batch)


state = jl.loop(step).run([1.0], jnp.zeros(()))
text: str = state.step_state  # error: assignment, reportAssignmentType
epoch: str = state.epoch  # error: assignment, reportAssignmentType
other: jl.State[str] = state  # error: assignment, reportAssignmentType
state.epoc  # error: attr-defined, reportAttributeAccessIssue
state.step_state.total  # error: attr-defined, reportAttributeAccessIssue
jl.serialize_state(3)  # error: arg-type, reportArgumentType
jl.restore("folder", 2.5)  # error: arg-type, reportArgumentType
for each in jl.loop(step).stream([1.0], jnp.zeros(())):
    name: str = each.step  # error: assignment, reportAssignmentType
