"""One process of the hand-written loop, which does not import jaxloop. Its parent is `processes`.

python -m benchmarks.limits.child_hand first 44
python -m benchmarks.limits.child_hand save 44 FOLDER
python -m benchmarks.limits.child_hand resume 44 FOLDER
"""

import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np

from benchmarks.limits.child import BATCH_SIZE, SIZES, Stopwatch, host_state, random_params
from benchmarks.perceptron import TX, random_batches, train_step


@partial(jax.jit, donate_argnums=0)
def step(carry, batch):
    """Runs one step and adds up the loss."""
    state, total = carry
    state, loss = train_step(batch, state)
    return state, total + loss


def epoch(state, batches, zero):
    """Runs one epoch, waits for it, and returns the state."""
    carry = state, zero
    for batch in batches:
        carry = step(carry, batch)
    float(carry[1])
    return carry[0]


def first(batches):
    """Trains the first epoch from a state on the host."""
    state = host_state()
    watch = Stopwatch()
    epoch(jax.device_put(state), batches, np.float32(0))
    watch.report()


def save(batches, folder):
    """Trains one epoch and saves the state."""
    # Imported here, because it takes as long as jax, and a first epoch does not need it.
    import orbax.checkpoint as ocp

    params = random_params(jax.random.key(0))
    state = jax.device_put({"params": params, "opt": TX.init(params)})
    state = epoch(state, batches, np.float32(0))
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder, state)


def resume(batches, folder):
    """Restores the state and trains until the end of an epoch, which is one block of jaxloop."""
    import orbax.checkpoint as ocp  # see `save`

    watch = Stopwatch.of_process()
    params = jax.eval_shape(lambda: random_params(jax.random.key(0)))
    target = jax.eval_shape(lambda p: {"params": p, "opt": TX.init(p)}, params)
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(folder, target)
        # Orbax commits arrays to their device. With an uncommitted zero, the second call of the
        # step would compile it again.
        epoch(state, batches, jax.device_put(np.float32(0), jax.devices()[0]))
        watch.report()


def main(what, num_batches, folder=None):
    """Runs one process."""
    batches = random_batches(SIZES, BATCH_SIZE, int(num_batches))
    if what == "first":
        first(batches)
    else:
        {"save": save, "resume": resume}[what](batches, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
