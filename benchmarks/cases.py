"""The ways of training that the benchmark compares: hand-written loops, one scan, and jaxloop.

    train = CASES["hand"](work)
    loss = train()          # trains `work.epochs` epochs; returns the mean loss of the last epoch

Creating a case may compile programs and place data. The benchmark times only the call.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def _whole_epoch(work):
    @partial(jax.jit, donate_argnums=0)
    def whole(state, stacked):
        state, losses = jax.lax.scan(lambda s, b: work.step(b, s), state, stacked)
        return state, losses.mean()

    return whole


def scan(work):
    """Runs one `lax.scan` per epoch over data on the device. This is the lower limit."""
    stacked = jax.device_put(jax.tree.map(lambda *b: np.stack(b), *work.batches))
    first, whole = work.init(), _whole_epoch(work)

    def train():
        state = _fresh(first)
        for _ in range(work.epochs):
            state, loss = whole(state, stacked)
        return float(loss)

    return train


def scan_shuffled(work):
    """Does the same as `scan`, and shuffles the data on the device before each epoch."""
    arrays, size, num_batches = jax.device_put((work.x, work.y)), work.batch_size, len(work.batches)
    first, whole = work.init(), _whole_epoch(work)

    @jax.jit
    def shuffled(arrays, epoch):
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(0), epoch), len(work.x))
        order = order[: num_batches * size]
        return jax.tree.map(lambda a: a[order].reshape(-1, size, *a.shape[1:]), arrays)

    def train():
        state = _fresh(first)
        for epoch in range(work.epochs):
            state, loss = whole(state, shuffled(arrays, epoch))
        return float(loss)

    return train


def own_loop(work):
    """Returns a loop with a step of its own, which reports the loss."""

    def step(batch, state):
        state, loss = work.step(batch, state)
        return jl.emit(state, loss=loss)

    return jl.loop(step).metric(_same, "loss", None, ["loss"])


def _same(loss):
    return loss


def train_on(work, loop, data):
    """Returns the case that runs a loop of an own step on data."""
    first = work.init()

    def train():
        state = loop.run(data, first, epochs=work.epochs)
        return float(state.history[work.epochs - 1]["loss"])

    return train


def jaxloop(work):
    """Runs `jl.loop` on a list of batches, with the loss as its metric."""
    return train_on(work, own_loop(work), work.batches)


def _shuffled(work, device):
    arrays = work.x, work.y
    return jl.batches(arrays, work.batch_size, shuffle=True, drop_remainder=True, device=device)


def jaxloop_shuffled(work):
    """Does the same as `jaxloop` on shuffled `jl.batches`."""
    return train_on(work, own_loop(work), _shuffled(work, False))


def jaxloop_device(work):
    """Does the same as `jaxloop_shuffled` with ``device=True``."""
    return train_on(work, own_loop(work), _shuffled(work, True))


def jaxloop_handlers(work):
    """Does the same as `jaxloop` with ten handlers that do not fire."""
    loop = own_loop(work)
    for index in range(10):
        loop = loop.handle("iteration_completed", print, jl.only(10**9 + index), name=f"h{index}")
    return train_on(work, loop, work.batches)


def jaxloop_observer(work):
    """Does the same as `jaxloop` with an observer that reads the loss in every iteration."""
    seen = []
    loop = own_loop(work).observe("iteration_completed", lambda s: seen.append(s.metrics["loss"]))
    train = train_on(work, loop, work.batches)

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


def metrics_loop(work, num_metrics):
    """Returns a loop whose step reports predictions, with one, five or ten metrics."""

    def step(batch, state):
        state, loss = work.step(batch, state)
        logits = work.apply(state["params"], batch[0])
        return jl.emit(state, loss=loss, y_true=batch[1], y_pred=logits)

    loop = jl.loop(step).metric(_same, "loss", None, ["loss"])
    if num_metrics >= 5:
        loop = loop.metric("accuracy").metric("top_k_categorical_accuracy")
        loop = loop.metric(_same, "least", "running_min", ["loss"])
        loop = loop.metric(_same, "most", "running_max", ["loss"])
    if num_metrics >= 10:
        loop = loop.metric(_same, "total", "running_sum", ["loss"])
        loop = loop.metric(_same, "last", "last", ["loss"])
        loop = loop.metric(jl.metrics.top_k_categorical_accuracy(k=1), "top_1")
        loop = loop.metric(lambda y: jnp.abs(y).mean(-1), "size", None, ["y_pred"])
        loop = loop.metric(lambda y: jnp.square(y).mean(-1), "square", None, ["y_pred"])
    return loop


def jaxloop_one_metric(work):
    """Runs a step that reports predictions, with one metric. Compare `jaxloop_five_metrics`."""
    return train_on(work, metrics_loop(work, 1), work.batches)


def jaxloop_five_metrics(work):
    """Does the same as `jaxloop_one_metric` with five metrics."""
    return train_on(work, metrics_loop(work, 5), work.batches)


def jaxloop_ten_metrics(work):
    """Does the same as `jaxloop_one_metric` with ten metrics."""
    return train_on(work, metrics_loop(work, 10), work.batches)


def trainer_loop(work):
    """Returns a trainer with loss and accuracy that does the step of the workload."""
    model = (lambda key, x: work.init_params(), work.apply)
    loss = optax.softmax_cross_entropy_with_integer_labels
    return jl.trainer(model, loss, TX, log=0).metric("accuracy")


def jaxloop_trainer(work):
    """Runs `jl.trainer` with the metric accuracy on `jl.batches` in order with ``device=True``."""
    data = jl.batches((work.x, work.y), work.batch_size, drop_remainder=True, device=True)
    loop, first = trainer_loop(work), work.init()["params"]

    def train():
        state = loop.final_state(data, first, epochs=work.epochs)
        return float(state.history[work.epochs - 1]["loss"])

    return train


CASES = {
    "hand": hand,
    "hand_float": hand_float,
    "hand_shuffled": hand_shuffled,
    "scan": scan,
    "scan_shuffled": scan_shuffled,
    "jaxloop": jaxloop,
    "jaxloop_shuffled": jaxloop_shuffled,
    "jaxloop_device": jaxloop_device,
    "jaxloop_handlers": jaxloop_handlers,
    "jaxloop_observer": jaxloop_observer,
    "jaxloop_objective": jaxloop_objective,
    "jaxloop_one_metric": jaxloop_one_metric,
    "jaxloop_five_metrics": jaxloop_five_metrics,
    "jaxloop_ten_metrics": jaxloop_ten_metrics,
    "jaxloop_trainer": jaxloop_trainer,
}
