"""Arguments of builder methods that cannot be right."""

import jax
import jax.numpy as jnp

import jaxloop as jl


def step(batch: jax.Array, total: jax.Array) -> jax.Array:
    return total + jnp.sum(batch)


loop = jl.loop(step)
loop.early_stop("loss", mode="mix")  # error: arg-type, reportArgumentType
loop.early_stop("loss", patience="3")  # error: arg-type, reportArgumentType
loop.early_stop("loss", min_delta="0.1")  # error: arg-type, reportArgumentType
loop.early_stop(3)  # error: arg-type, reportArgumentType
loop.early_stop("loss", patiense=3)  # error: call-arg, reportCallIssue
loop.monitor("loss", print, mode="max")  # error: call-arg, reportCallIssue
loop.reduce_lr_on_plateau("loss", factor="half")  # error: arg-type, reportArgumentType
loop.metric(3)  # error: arg-type, reportArgumentType
jl.window("a")  # error: arg-type, reportArgumentType
loop.derive("a", 3, of="b")  # error: arg-type, reportArgumentType
loop.metric("accuracy", 3)  # error: arg-type, reportArgumentType
loop.metric("accuracy", None, "running_mean")  # error: arg-type, reportArgumentType
loop.validate([1.0], eval_step=3)  # error: arg-type, reportArgumentType
loop.validate([1.0], metrics={"a": 3})  # error: dict-item, reportArgumentType
loop.checkpoint("folder", keep="3")  # error: arg-type, reportArgumentType
loop.checkpoint("folder", mode="maximum")  # error: arg-type, reportArgumentType
loop.nan_guard("rewnd")  # error: arg-type, reportArgumentType
loop.log(3)  # error: arg-type, reportArgumentType
loop.write("metrics.csv")  # error: arg-type, reportArgumentType
loop.write(jl.writers.csv("a"), every="2")  # error: arg-type, reportArgumentType
loop.from_state(3)  # error: arg-type, reportArgumentType
loop.resume(3)  # error: arg-type, reportArgumentType
jl.trainer((step, step), "huber", "adam", log="often")  # error: arg-type, reportArgumentType
jl.batches(jnp.ones(8), "4")  # error: arg-type, reportArgumentType
jl.from_train_step(3)  # error: arg-type, reportArgumentType
