"""The type of a step's state reaches the loop, the state and the handlers."""

from typing import NamedTuple, assert_type

import jax
import jax.numpy as jnp
import numpy as np

import jaxloop as jl


class Sums(NamedTuple):
    total: jax.Array
    num: jax.Array


def step(batch: jax.Array, state: Sums) -> Sums:
    return Sums(state.total + jnp.sum(batch), state.num + 1)


def init(batch: jax.Array, init_state: None) -> Sums:
    return Sums(jnp.zeros(()), jnp.zeros(()))


START = Sums(jnp.zeros(()), jnp.zeros(()))
DATA = [np.ones(3, np.float32)]

loop = jl.loop(step)
assert_type(loop.run(DATA, START), jl.State[Sums])
assert_type(loop.run(DATA, START).step_state, Sums)
assert_type(loop.run(DATA, START, epochs=2, fuse="auto").step_state.total, jax.Array)
assert_type(jl.loop(step, init).run(DATA), jl.State[Sums])

for state in loop.stream(DATA, START, epochs=3):
    assert_type(state, jl.State[Sums])
    assert_type(state.epoch, int)

loop.run(DATA, START, iterations=3, jit=False, fuse=2, strict=True, debug=True)
loop.run(jl.batches(np.ones(8), 2, shuffle=True), START)
loop.run(lambda epoch: DATA, START, epochs=2)
loop.run(iter(DATA), START)
loop.run(None, START, iterations=5)
loop.check(DATA, START)


def evaluate(batch: jax.Array, state: Sums) -> dict[str, jax.Array]:
    return {"error": jnp.abs(batch - state.total)}


validated = loop.validate(DATA, eval_step=evaluate, metrics={"error": "error", "max": jnp.max})
assert_type(validated.run(DATA, START), jl.State[Sums])
