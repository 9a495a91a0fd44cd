"""The ways of training that the benchmark compares: hand-written loops, one scan, and jaxloop.

    train = CASES["hand"](work)
    loss = train()          # trains `work.epochs` epochs; returns the mean loss of the last epoch

Creating a case may compile programs and place data. The benchmark times only the call.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxloop as jl
from benchmarks.workloads import TX


def _fresh(state):
    return jax.tree.map(jnp.copy, jax.device_put(state))


def _hand_step(work):
    @partial(jax.jit, donate_argnums=0)
    def by_hand(carry, batch):
        state, total = carry
        state, loss = work.step(batch, state)
        return state, total + loss

    return by_hand


def hand(work):
    """Calls a jitted, donating step for each batch, and accumulates the loss in the carry."""
    by_hand, batches, first = _hand_step(work), work.batches, work.init()

    def train():
        state = _fresh(first)
        for _ in range(work.epochs):
            carry = state, jnp.float32(0)
            for batch in batches:
                carry = by_hand(carry, batch)
            state = carry[0]
        return float(carry[1]) / len(batches)

    return train


def hand_float(work):
    """Does the same as `hand`, and reads the loss after each step."""
    step, batches, first = jax.jit(work.step, donate_argnums=1), work.batches, work.init()

    def train():
        state = _fresh(first)
        for _ in range(work.epochs):
            total = 0.0
            for batch in batches:
                state, loss = step(batch, state)
                total += float(loss)
        return total / len(batches)

    return train


def hand_shuffled(work):
    """Does the same as `hand`, and shuffles the data in each epoch."""
    by_hand, first, x, y, size = _hand_step(work), work.init(), work.x, work.y, work.batch_size

    def train():
        state = _fresh(first)
        for epoch in range(work.epochs):
            carry = state, jnp.float32(0)
            order = np.random.default_rng([0, epoch]).permutation(len(x))
            for low in range(0, len(x) - size + 1, size):
                where = order[low : low + size]
                carry = by_hand(carry, (x[where], y[where]))
            state = carry[0]
        return float(carry[1]) / len(work.batches)

    return train


def scan(work):
    """Runs one `lax.scan` per epoch over data on the device. This is the lower limit."""
    stacked = jax.device_put(jax.tree.map(lambda *b: np.stack(b), *work.batches))
    first = work.init()

    @partial(jax.jit, donate_argnums=0)
    def whole(state, stacked):
        state, losses = jax.lax.scan(lambda s, b: work.step(b, s), state, stacked)
        return state, losses.mean()

    def train():
        state = _fresh(first)
        for _ in range(work.epochs):
            state, loss = whole(state, stacked)
        return float(loss)

    return train


def _loop(work):
    def step(batch, state):
        state, loss = work.step(batch, state)
        return jl.emit(state, loss=loss)

    return jl.loop(step).metric(_same, "loss", None, ["loss"])


def _same(loss):
    return loss


def _train(work, loop, data):
    first = work.init()

    def train():
        state = loop.run(data, first, epochs=work.epochs)
        return float(state.history[work.epochs - 1]["loss"])

    return train


def jaxloop(work):
    """Runs `jl.loop` on a list of batches, with the loss as its metric."""
    return _train(work, _loop(work), work.batches)


def _shuffled(work, device):
    arrays = work.x, work.y
    return jl.batches(arrays, work.batch_size, shuffle=True, drop_remainder=True, device=device)


def jaxloop_shuffled(work):
    """Does the same as `jaxloop` on shuffled `jl.batches`."""
    return _train(work, _loop(work), _shuffled(work, False))


def jaxloop_device(work):
    """Does the same as `jaxloop_shuffled` with ``device=True``."""
    return _train(work, _loop(work), _shuffled(work, True))


def jaxloop_handlers(work):
    """Does the same as `jaxloop` with ten handlers that do not fire."""
    loop = _loop(work)
    for index in range(10):
        loop = loop.handle("iteration_completed", print, jl.only(10**9 + index), name=f"h{index}")
    return _train(work, loop, work.batches)


def jaxloop_observer(work):
    """Does the same as `jaxloop` with an observer that reads the loss in every iteration."""
    seen = []
    loop = _loop(work).observe("iteration_completed", lambda s: seen.append(s.metrics["loss"]))
    train = _train(work, loop, work.batches)

    def clean():
        seen.clear()
        return train()

    return clean


def jaxloop_objective(work):
    """Does the same as `jaxloop` with `jl.trainer` and an objective in place of an own step."""

    @jl.objective
    def loss(model, batch):
        return work.losses(model.params, batch)

    model = (lambda key, x: work.init_params(), work.apply)
    loop = jl.trainer(model, loss, TX, inputs=lambda batch: batch[0], log=0)
    first = work.init()["params"]

    def train():
        state = loop.final_state(work.batches, first, epochs=work.epochs)
        return float(state.history[work.epochs - 1]["loss"])

    return train


def jaxloop_five_metrics(work):
    """Does the same as `jaxloop_one_metric` with five metrics."""

    def step(batch, state):
        state, loss = work.step(batch, state)
        logits = work.apply(state["params"], batch[0])
        return jl.emit(state, loss=loss, y_true=batch[1], y_pred=logits)

    loop = jl.loop(step).metric(_same, "loss", None, ["loss"])
    for name in ("accuracy", "top_k_categorical_accuracy"):
        loop = loop.metric(name)
    for name in ("running_min", "running_max"):
        loop = loop.metric(_same, name, name, ["loss"])
    return _train(work, loop, work.batches)


def jaxloop_one_metric(work):
    """Runs a step that reports predictions, with one metric. Compare `jaxloop_five_metrics`."""

    def step(batch, state):
        state, loss = work.step(batch, state)
        logits = work.apply(state["params"], batch[0])
        return jl.emit(state, loss=loss, y_true=batch[1], y_pred=logits)

    return _train(work, jl.loop(step).metric(_same, "loss", None, ["loss"]), work.batches)


CASES = {
    "hand": hand,
    "hand_float": hand_float,
    "hand_shuffled": hand_shuffled,
    "scan": scan,
    "jaxloop": jaxloop,
    "jaxloop_shuffled": jaxloop_shuffled,
    "jaxloop_device": jaxloop_device,
    "jaxloop_handlers": jaxloop_handlers,
    "jaxloop_observer": jaxloop_observer,
    "jaxloop_objective": jaxloop_objective,
    "jaxloop_one_metric": jaxloop_one_metric,
    "jaxloop_five_metrics": jaxloop_five_metrics,
}
