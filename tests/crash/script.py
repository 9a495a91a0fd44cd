"""A script that may be killed at any moment: it trains the digits, and goes on where it was.

    python -m tests.crash.script <folder>               # once
    python -m tests.crash.script <folder> --serve       # a life for each line of input

Its last line is what two runs of it must have in common.
"""

from __future__ import annotations

import json
import os
import sys

import flax.linen as nn
import jax
import optax
import orbax.checkpoint  # noqa: F401  here, so that a life does not have to

import jaxloop as jl
from tests.digest import digest

EPOCHS = 40


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x))


def main(folder: str) -> dict[str, str]:
    """Trains to the end; returns the digest."""
    train, validation = jl.datasets.digits()
    look = {"event": "iteration_completed", "filter": jl.every(37)}
    loss = optax.softmax_cross_entropy_with_integer_labels
    loop = (
        jl.trainer(Model(), loss, optax.adam(1e-2), log=0)
        .metric("accuracy")
        .validate(jl.batches(validation, 128), **look)
        .reduce_lr_on_plateau("validation_loss", patience=1, cooldown=1, factor=0.7, **look)
        .early_stop("validation_loss", patience=5, restore_best=True, **look)
        .checkpoint(folder, event="iteration_completed", filter=jl.every(11))
        .resume(folder)
    )
    data = jl.batches(train, 32, shuffle=True, pad=True)
    output = []

    def both(state):
        output.append(jax.device_get(state.step_state["model_state"]))
        return state

    # What `run` returns is made from the best state; the state that is saved is the last.
    best = loop.run(data, epochs=EPOCHS, output_transform=both)
    last = jl.restore(folder, like=best)
    return {**digest(last, output[-1]), "step": str(last.step), "halted_by": str(last.halted_by)}


def serve(folder: str) -> None:
    """A process for each line that comes; what they share was imported before, and no more."""
    for line in sys.stdin:
        life = os.fork()
        if not life:
            os.setsid()
            with open(line.strip(), "w") as file:
                file.write(json.dumps(main(folder)))
            os._exit(0)
        print(life, flush=True)
        os.waitpid(life, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    # What one life has compiled need not be compiled by the next.
    jax.config.update("jax_compilation_cache_dir", os.environ.get("CRASH_CACHE"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if "--serve" in sys.argv:
        serve(sys.argv[1])
    else:
        print(json.dumps(main(sys.argv[1])))
