"""What `run` returns has the type that the output transform gives it."""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np

import jaxloop as jl


def step(batch: jax.Array, total: jax.Array) -> jax.Array:
    return total + jnp.sum(batch)


def num_steps(state: jl.State[jax.Array]) -> int:
    return state.step


def weights(key: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.ones((x.shape[-1], 1))


def predict(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


assert_type(jl.loop(step, None, num_steps).run([1.0], jnp.zeros(())), int)
assert_type(jl.loop(step).run([1.0], jnp.zeros(()), output_transform=num_steps), int)

x = np.ones((4, 2), np.float32)
data = jl.batches((x, x[:, :1]), 2)
values = jl.evaluator((weights, predict)).metric("mean_squared_error").run(data, jnp.ones((2, 1)))
assert_type(values, dict[str, Any])

trainer = jl.trainer((weights, predict), "mean_squared_error", "adam", log=0)
trainer.metric("mean_absolute_error").validate(data).run(data, epochs=2)

state = jl.loop(step).run([1.0], jnp.zeros(()))
saved = jl.serialize_state(state, compress=True)
assert_type(saved, bytes)
back = jl.deserialize_state(saved, like=state)
print(back.step, jl.restore("checkpoints", "best", like=state).epoch)

counting = jl.loop(step, None, num_steps)
final = counting.final_state([1.0], jnp.zeros(()), steps=10, fuse=2)
assert_type(final, jl.State[jax.Array])
assert_type(counting.output(final), int)
assert_type(final.max_step, int | None)
assert_type(counting.restore("runs", "best", data=[1.0]), jl.State[jax.Array])
assert_type(counting.output(counting.restore("runs", 5, init_state=0.0)), int)
assert_type(counting.checkpoint("runs", resume=True).run([1.0], jnp.zeros(())), int)
replayed, batch = counting.replay("runs", 1234, data=[1.0], init_state=jnp.zeros(()), fuse=1)
assert_type(replayed, jl.State[jax.Array])
print(step(batch, replayed.step_state))


def train_step(w: jax.Array, batch: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return w + 1, {"loss": jnp.sum(batch)}


def eval_step(w: jax.Array, batch: jax.Array) -> dict[str, jax.Array]:
    return {"loss": jnp.sum(batch)}


adopted = jl.from_train_step(train_step, eval_step=eval_step, key=0).validate([1.0])
assert_type(adopted.run([1.0], jnp.zeros(()), epochs=2), jl.State[Any])
