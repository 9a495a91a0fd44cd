"""Saves while writes fail, one after the other; see `tests.test_faults`.

    LD_PRELOAD=faults.so python -m tests.faults.script faults.so <folder> <stride>

A stride of 1 lets every write fail, one of n every n-th. Its last line counts what happened.
"""

from __future__ import annotations

import collections
import ctypes
import json
import shutil
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxloop as jl
from jaxloop.errors import CheckpointError

COUNT, FAIL, FULL, TRUNCATE = range(4)
DATA = [np.full(300, i, np.float32) for i in range(2)]


def step(batch, state):
    return jl.emit({"w": state["w"] * 0.5 + batch, "n": state["n"] + 1}, x=batch[0])


START = {"w": jnp.arange(300.0), "n": 0}
LOOP = jl.loop(step).metric(lambda x: x, "mean", None, ["x"])


def numbers(state):
    """What a state must have exactly, by its step."""
    w = np.asarray(state.step_state["w"]).tobytes()
    return int(state.step_state["n"]), w, float(state.metrics["mean"])


class Faults:
    def __init__(self, library):
        self._library = ctypes.CDLL(library)

    def arm(self, folder, mode, n):
        self._library.faults_arm(str(folder).encode(), mode, n)

    def disarm(self):
        return self._library.faults_disarm()


def attempt(faults, good, mode, n, loop, true):
    """One save with a fault; returns what came of it."""
    folder = good.parent / "now"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    resumed = loop.resume(folder)
    outcome = "no error"
    faults.arm(folder, mode, n)
    try:
        resumed.run(DATA, START, epochs=3)
    except CheckpointError as error:
        assert str(folder) in str(error) and "fix:" in str(error), error
        outcome = "error"
    finally:
        num_calls = faults.disarm()
    if mode == COUNT:
        return num_calls
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        back = jl.restore(folder, like=START)
        again = LOOP.resume(folder).run(DATA, START, epochs=3)
    # What is there is whole, and what was good before is there for as long as nothing newer is.
    assert numbers(back) == true[back.step], (mode, n, back)
    assert back.step >= 4, (mode, n, back)
    assert numbers(again) == true[6], (mode, n, again)
    if mode != TRUNCATE:
        assert outcome == "error" or back.step == 6, (mode, n, "a failure that nobody heard of")
    elif back.step != 6 and outcome != "error":
        assert any("is damaged and skipped" in str(w.message) for w in caught), (mode, n)
        outcome = "damage found"
    return outcome


def main(library, folder, every):
    every, folder = int(every), Path(folder).resolve()
    faults = Faults(library)
    true = {s.step: numbers(s) for s in LOOP.stream(DATA, START, epochs=3)}
    saving = {
        "named": lambda path: LOOP.checkpoint(path, event="completed", keep=2),
        # One checkpoint only: each replaces the one before.
        "replaced": lambda path: LOOP.checkpoint(
            path, event="completed", keep=1, file_pattern=lambda state: "only"
        ),
    }
    counted = {}
    for kind, modes in (("replaced", (FAIL, FULL)), ("named", (TRUNCATE, FAIL))):
        good = folder / kind
        saving[kind](good).run(DATA, START, epochs=1)
        saving[kind](good).resume(good).run(DATA, START, epochs=2)
        assert jl.restore(good, like=START).step == 4
        loop = saving[kind](folder / "now")
        for mode in modes:
            if mode == TRUNCATE:
                # Counts data alone, and truncates none.
                num_calls = attempt_count(faults, good, loop)
            else:
                num_calls = attempt(faults, good, COUNT, 0, loop, true)
            # A full disk, and failures that the other kind has had, are tried more sparsely.
            stride = every * (1 if (kind, mode) in (("replaced", FAIL), ("named", TRUNCATE)) else 5)
            outcomes = collections.Counter(
                attempt(faults, good, mode, n, loop, true) for n in range(1, num_calls + 1, stride)
            )
            counted[f"{kind} {('', 'fail', 'full', 'truncate')[mode]}"] = {
                "calls": num_calls,
                **outcomes,
            }
    print(json.dumps(counted))


def attempt_count(faults, good, loop):
    folder = good.parent / "now"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    faults.arm(folder, TRUNCATE, 0)
    loop.resume(folder).run(DATA, START, epochs=3)
    return faults.disarm()


if __name__ == "__main__":
    main(*sys.argv[1:])
