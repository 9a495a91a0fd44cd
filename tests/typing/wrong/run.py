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
jl.loop(three)  # error: arg-type, reportArgumentType reportCallIssue
jl.loop(one)  # error: arg-type, reportArgumentType reportCallIssue
jl.loop(lambda b, s, extra: s)  # error: arg-type misc, reportArgumentType reportCallIssue
jl.loop(3)  # error: call-overload, reportArgumentType reportCallIssue
loop.run([1.0], ZERO, fuse="always")  # error: call-overload, reportArgumentType
loop.run([1.0], ZERO, epochs="3")  # error: call-overload, reportArgumentType
loop.run([1.0], ZERO, iterations=2.5)  # error: call-overload, reportArgumentType
loop.run([1.0], ZERO, jit="yes")  # error: call-overload, reportArgumentType
loop.run([1.0], ZERO, epoch=3)  # error: call-overload, reportCallIssue
loop.run(3, ZERO)  # error: call-overload, reportArgumentType
loop.stream([1.0], ZERO, fuse="always")  # error: call-overload, reportArgumentType
loop.check([1.0], ZERO, fuse="always")  # error: arg-type, reportArgumentType
loop.run([1.0], ZERO, steps="3")  # error: call-overload, reportArgumentType
loop.final_state([1.0], ZERO, output_transform=len)  # error: call-arg, reportCallIssue
loop.final_state([1.0], ZERO, epoch=3)  # error: call-arg, reportCallIssue
loop.output(3)  # error: arg-type, reportArgumentType
loop.replay("runs", 5)  # error: call-arg, reportCallIssue
loop.replay("runs", "5", data=[1.0])  # error: arg-type, reportArgumentType
loop.restore("runs", "newest")  # error: arg-type, reportArgumentType
