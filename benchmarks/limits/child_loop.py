"""One process that trains with jaxloop, like `child_hand`. Its parent is `processes`.

python -m benchmarks.limits.child_loop first 44 own 5       # an own step with five metrics
python -m benchmarks.limits.child_loop save 44 trainer FOLDER
python -m benchmarks.limits.child_loop resume 44 trainer FOLDER
"""

import sys

import jax
import optax

import jaxloop as jl
from benchmarks.limits.child import BATCH_SIZE, SIZES, Stopwatch, host_state, random_params
from benchmarks.perceptron import TX, apply, init_params, random_batches, train_step


def own(num_metrics=1, init_fn=None):
    """Returns a loop with an own step, with one or five metrics."""

    def step(batch, state):
        params = state["params"]
        state, loss = train_step(batch, state)
        if num_metrics == 1:
            return jl.emit(state, loss=loss)
        return jl.emit(state, loss=loss, y_true=batch[1], y_pred=apply(params, batch[0]))

    loop = jl.loop(step, init_fn).metric(_same, "loss", None, ["loss"])
    if num_metrics == 5:
        loop = loop.metric("accuracy").metric("top_k_categorical_accuracy")
        loop = loop.metric(_same, "least", "running_min", ["loss"])
        loop = loop.metric(_same, "most", "running_max", ["loss"])
    return loop


def _same(loss):
    return loss


def trainer(init):
    """Returns a trainer with loss and accuracy."""
    loss = optax.softmax_cross_entropy_with_integer_labels
    return jl.trainer((init, apply), loss, TX, log=0).metric("accuracy")


def first(batches, kind, num_metrics="1"):
    """Trains the first epoch from a state on the host."""
    params, state = init_params(SIZES), host_state()
    watch = Stopwatch()
    if kind == "own":
        state = own(int(num_metrics)).run(batches, state)
    else:
        state = trainer(lambda key, x: params).final_state(batches)
    float(state.history[0]["loss"])
    watch.report()


def _random_loop(kind):
    """Returns a loop whose initial state is random, so it is made by an init function."""
    if kind == "trainer":
        return trainer(lambda key, x: random_params(key))

    def init(batch, _):
        params = random_params(jax.random.key(0))
        return {"params": params, "opt": TX.init(params)}

    return own(init_fn=init)


def _one_block(loop, batches, state, epochs, watch):
    """Runs the loop to the end of its first block, which ends with the epoch, and reports."""

    def report(state):
        jax.block_until_ready(state.step_state)
        watch.report()

    loop = loop.handle("iteration_completed", report, jl.every(len(batches)))
    loop.run(batches, state, epochs=epochs)


def fresh(batches, kind):
    """Runs the first block of a fresh run, of an own step from a state on the host."""
    state = host_state() if kind == "own" else None
    watch = Stopwatch()
    _one_block(own() if kind == "own" else _random_loop(kind), batches, state, 1, watch)


def save(batches, kind, folder):
    """Trains one epoch and saves the state."""
    _random_loop(kind).checkpoint(folder).run(batches)


def resume(batches, kind, folder):
    """Resumes and runs one block."""
    watch = Stopwatch.of_process()
    _one_block(_random_loop(kind).checkpoint(folder, resume=True), batches, None, 2, watch)


def main(what, num_batches, *rest):
    """Runs one process."""
    batches = random_batches(SIZES, BATCH_SIZE, int(num_batches))
    {"first": first, "fresh": fresh, "save": save, "resume": resume}[what](batches, *rest)


if __name__ == "__main__":
    main(*sys.argv[1:])
