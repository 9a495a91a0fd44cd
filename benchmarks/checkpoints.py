"""Measures checkpoints: how long a save holds up the loop, and how long resuming takes.

    python -m benchmarks.checkpoints            # a state of 100 MB, with few and with many leaves
    python -m benchmarks.checkpoints --smoke    # a small state, to check that the benchmark runs

The figures are milliseconds, medians of interleaved repeats:

- `held up` is the time in the driver from the firing that saves to the next block.
- `idle` is the same, if the device has nothing to do when the save begins.
- `digests` is the time that SHA-256 takes for the arrays on one core, as in the saving thread.
- `slower` is how much longer an epoch with saves takes than one without, divided by the number of
  saves. It includes the time that writing takes from the cores that also run the step.
- `sync` is the same save by Orbax alone, including the wait for it.
- `Orbax` is a bare restore of the same arrays.
"""

import argparse
import gc
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import jaxloop as jl
from benchmarks.timing import interleaved, memory_mb, timed

# Leaves, numbers in each, and steps between two saves, in which the save before must end.
SHAPES = {
    "25 leaves": (25, 1_000_000, 1600),
    "200 leaves": (200, 125_000, 1600),
    "400 MB": (25, 4_000_000, 3200),
}
SMALL = {"5 leaves": (5, 1000, 2)}
HELD_UP_SHARE, HELD_UP_S, RESUME_RATIO = 0.1, 0.005, 1.5


def make_state(num_leaves, size):
    """Returns float32 arrays of random numbers, and a matrix that the step multiplies."""
    rng = np.random.default_rng(0)
    leaves = {f"l{i:03d}": rng.normal(size=size).astype(np.float32) for i in range(num_leaves)}
    return {"leaves": leaves, "work": np.eye(256, dtype=np.float32)}


def step(batch, state):
    """Works for a few milliseconds and changes every array."""
    work = jax.lax.fori_loop(0, 8, lambda _, w: jnp.tanh(w @ state["work"]), state["work"])
    leaves = jax.tree.map(lambda x: x.at[0].add(batch), state["leaves"])
    return {"leaves": leaves, "work": work}


def second_epoch(loop, path, data, state):
    """Returns the times of the second epoch: the first compiles, and the end waits for a save."""
    done = loop.run(data, state, epochs=2)
    shutil.rmtree(path, ignore_errors=True)
    return done.times[1]


def held_up_idle(folder, state, repeats, pause_s):
    """Returns the seconds that a save holds up a loop whose device is idle."""

    def wait(state):
        time.sleep(pause_s)  # the device has finished, and so has the save before

    idle = jl.loop(lambda batch, n: {**n, "work": n["work"] + batch})
    idle = idle.handle("iteration_completed", wait)
    saving = idle.checkpoint(folder, event="iteration_completed", filter=jl.every(2), keep=1)
    data = [np.float32(1)] * 6
    without, with_saves = idle.run(data, state, epochs=1), []
    for _ in range(repeats):
        done = saving.run(data, state, epochs=2)  # the first epoch compiles the copy
        with_saves.append(done.times[1].handlers_s)
        shutil.rmtree(folder)
    # The end of the run waits for its last save, so only those in mid-epoch count.
    return (statistics.median(with_saves) - without.times[0].handlers_s) / (len(data) // 2)


def held_up_busy(folder, state, every, repeats):
    """Returns the seconds that a save holds up a loop whose device works, and makes it slower."""
    saves = 2
    data = [np.float32(1)] * (saves * every)
    plain = jl.loop(step).handle("iteration_completed", lambda s: None, jl.every(every))
    saving = jl.loop(step).checkpoint(
        folder / "loop", event="iteration_completed", filter=jl.every(every), keep=1
    )
    held, slower = [], []
    for _ in range(repeats):
        without = second_epoch(plain, folder / "none", data, state)
        with_saves = second_epoch(saving, folder / "loop", data, state)
        held.append((with_saves.handlers_s - without.handlers_s) / saves)
        slower.append((with_saves - without) / saves)
    return statistics.median(held), statistics.median(slower)


def waited_for(writer, path, trees, repeats):
    """Returns the seconds of a save by Orbax alone, including the wait for it."""
    arguments = ocp.args.Composite(state=ocp.args.StandardSave(trees))

    def save():
        shutil.rmtree(path, ignore_errors=True)
        return timed(lambda: writer.save(path, args=arguments))

    return statistics.median(save() for _ in range(repeats))


def measure(num_leaves, size, every, repeats):
    """Returns ``{name: milliseconds}`` for one shape of state."""
    folder = Path(tempfile.mkdtemp())
    state, data = make_state(num_leaves, size), [np.float32(1)]
    held, slower = held_up_busy(folder, state, every, repeats)
    pause_s = 0.1 if repeats == 1 else 1.0
    idle = held_up_idle(folder / "idle", state, repeats, pause_s)
    trees = jax.device_put({"tree": state})
    arrays = list(state["leaves"].values())
    digest_s = statistics.median(
        timed(lambda: [hashlib.sha256(array).digest() for array in arrays]) for _ in range(repeats)
    )
    writer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    sync = waited_for(writer, folder / "bare", trees, repeats)

    end = jl.loop(step).checkpoint(folder / "end")
    end.run(data, state)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), trees)
    target = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
    onward = end.resume(folder / "end")

    def resume():
        jax.block_until_ready(onward.run(data, state).step_state)

    def fresh():
        jax.block_until_ready(jl.loop(step).run(data, state, epochs=0).step_state)

    def bare():
        jax.block_until_ready(writer.restore(folder / "bare", args=target).state)

    def by_hand():
        jax.block_until_ready(jl.restore(folder / "end", like=state).step_state)

    cases = {"resume": resume, "fresh": fresh, "Orbax": bare, "jl.restore": by_hand}
    times = interleaved(cases, repeats)
    writer.close()
    shutil.rmtree(folder)
    return {
        "held up": 1e3 * held,
        "idle": 1e3 * idle,
        "digests": 1e3 * digest_s,
        "slower": 1e3 * slower,
        "sync": 1e3 * sync,
        # Subtract the work that every run does before its first step.
        "resume": 1e3 * (times["resume"] - times["fresh"]),
        "jl.restore": 1e3 * times["jl.restore"],
        "Orbax": 1e3 * times["Orbax"],
    }


def growth(epochs):
    """Returns the megabytes that a process grows by after the first tenth of the checkpoints."""
    folder = tempfile.mkdtemp()
    loop = jl.loop(lambda batch, total: total + batch).checkpoint(folder, keep=2)
    sizes = []
    for state in loop.stream([np.float32(1)], 0.0, epochs=epochs):
        if state.epoch in (epochs // 10, epochs - 1):
            gc.collect()
            sizes.append(memory_mb())
    shutil.rmtree(folder)
    return sizes[-1] - sizes[0]


def main(arguments=None):
    """Runs the benchmark and returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="use a small state")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    shapes = SMALL if options.smoke else SHAPES
    repeats = 1 if options.smoke else options.repeats
    epochs = 20 if options.smoke else 1000
    # First: what large states leave to the allocator would hide it.
    figures = {"growth_mb": growth(epochs)}
    print(f"{epochs} checkpoints: {figures['growth_mb']:.1f} MB of growth after the first tenth")
    for name, shape in shapes.items():
        figures[name] = found = measure(*shape, repeats)
        bar = 1e3 * max(HELD_UP_SHARE * found["sync"] / 1e3, HELD_UP_S)
        ratio = found["resume"] / found["Orbax"]
        print(
            f"{name}: a save holds up the loop for {found['held up']:.1f} ms (idle "
            f"{found['idle']:.1f}, bar {bar:.1f}, sync {found['sync']:.0f}), digests take "
            f"{found['digests']:.0f} ms, and a save makes it {found['slower']:.1f} ms slower; "
            f"resume {found['resume']:.0f} ms, {ratio:.2f} of Orbax's {found['Orbax']:.0f} (bar "
            f"{RESUME_RATIO}); jl.restore {found['jl.restore']:.0f} ms"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
