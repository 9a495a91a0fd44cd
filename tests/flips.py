"""Flips single bits in the files of a checkpoint; see `tests.test_folders`.

    python -m tests.flips <folder> <number of flips>

Each flip must be found, or must not matter. Its last line counts what happened. It is a process of
its own, because Orbax leaves coroutines behind whenever it fails to read.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import flax.linen as nn
import numpy as np
import optax

import jaxloop as jl
from tests.digest import hash_tree

X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
Y = (np.arange(40) % 3).astype(np.int32)
LOSS = optax.softmax_cross_entropy_with_integer_labels


def trained(folder):
    """Writes the checkpoints of steps 2, 4 and 5, and returns the final state."""
    loop = jl.trainer(nn.Dense(3), LOSS, optax.adam(0.1), log=0)
    loop = loop.early_stop("loss", patience=9, restore_best=True)
    loop = loop.checkpoint(folder, event="iteration_completed", filter=jl.every(2))
    return loop.run(jl.batches((X, Y), 8), output_transform=lambda state: state)


def everything(state):
    return hash_tree((state.step_state, dict(state.handler_state), dict(state.history), state.step))


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(bytes(data))


def main(folder, num_flips):
    like = trained(folder).step_state
    true = everything(jl.restore(folder, like=like))
    files = sorted(path for path in (folder / "5").rglob("*") if path.is_file())
    files = [path for path in files if path.stat().st_size]
    rng = np.random.default_rng(num_flips)
    counted = {"found": 0, "harmless": 0}
    for _ in range(num_flips):
        # Any file with the same chance, because most of the bytes are in one of them.
        path = files[rng.integers(len(files))]
        before = path.read_bytes()
        flip(path, int(rng.integers(8 * len(before))))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = jl.restore(folder, like=like)
        if state.step == 5:
            assert everything(state) == true, (path, "wrong numbers")
            counted["harmless"] += 1
        else:
            messages = [str(one.message) for one in caught]
            assert state.step == 4, path
            assert any("5 is damaged and skipped" in message for message in messages), messages
            counted["found"] += 1
        path.write_bytes(before)
    assert everything(jl.restore(folder, like=like)) == true
    print(json.dumps(counted))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
