"""The trainer that wrote `tests/data/trainer_format_2`, and failed one step later.

python -m tests.kept_trainer tests/data/trainer_format_2
"""

import sys

import flax.linen as nn
import numpy as np
import optax

import jaxloop as jl

X = np.linspace(-1, 1, 48, dtype=np.float32).reshape(12, 4)
DATA = jl.batches((X, X[:, :2]), 4, shuffle=True)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(nn.Dense(4)(x)))


def loop():
    trainer = jl.trainer(Net(), "mean_squared_error", optax.adam(0.1), log=0)
    return trainer.reduce_lr_on_plateau("loss", patience=1, min_delta=1e9, factor=0.5, mode="min")


def fail(state):
    raise RuntimeError


if __name__ == "__main__":
    saving = loop().checkpoint(sys.argv[1], event="iteration_completed", filter=jl.only(8))
    saving.handle("iteration_completed", fail, jl.only(9)).run(DATA, epochs=4)
