"""Steps and options of `run` that cannot be right."""

import jax
import jax.numpy as jnp

import jaxloop as jl


def step(batch: jax.Array, total: jax.Array) -> jax.Array:
    return total + jnp.sum(batch)


def three(batch: jax.Array, total: jax.Array, extra: int) -> jax.Array:
    return total


def one(batch: jax.Array) -> jax.Array:
    return batch


ZERO = jnp.zeros(())
loop = jl.loop(step)
jl.loop(three)  # error: arg-type, reportArgumentType
jl.loop(one)  # error: arg-type, reportArgumentType
jl.loop(lambda batch, state, extra: state)  # error: arg-type misc, reportArgumentType
jl.loop(3)  # error: arg-type, reportArgumentType
loop.run([1.0], ZERO, fuse="always")  # error: arg-type, reportArgumentType
loop.run([1.0], ZERO, epochs="3")  # error: arg-type, reportArgumentType
loop.run([1.0], ZERO, iterations=2.5)  # error: arg-type, reportArgumentType
loop.run([1.0], ZERO, jit="yes")  # error: arg-type, reportArgumentType
loop.run([1.0], ZERO, epoch=3)  # error: call-arg, reportCallIssue
loop.run(3, ZERO)  # error: arg-type, reportArgumentType
loop.stream([1.0], ZERO, fuse="always")  # error: arg-type, reportArgumentType
loop.check([1.0], ZERO, fuse="always")  # error: arg-type, reportArgumentType
