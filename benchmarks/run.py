"""Times jaxloop against a hand-written loop and a bare scan, side by side in one process.

    python -m benchmarks.run [--smoke] [--json FILE]

Every case does the same work: the same step on the same batches, with the average of the loss over
the epoch. The cases take turns, and the median of each is what is shown.

- hand: one donated `jax.jit` call a step, the loss accumulated in the carry, batches on the host;
- scan: one `lax.scan` over an epoch that lies on the device already: the limit;
- jaxloop: `jl.loop(step).metric(...)`, batches on the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxloop as jl

WORKLOADS = {
    "MLP 8-8-2, batch 8": ((8, 8, 2), 8, 400),
    "MLP 64-64-10, batch 32": ((64, 64, 10), 32, 400),
}


def make(sizes, batch_size, num_batches):
    """The batches, the first state and the step of one workload."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_batches, batch_size, sizes[0])).astype(np.float32)
    y = rng.integers(0, sizes[-1], (num_batches, batch_size)).astype(np.int32)
    params = [
        rng.normal(size=(a, b)).astype(np.float32) / np.sqrt(a).astype(np.float32)
        for a, b in zip(sizes, sizes[1:], strict=False)
    ]
    state = {"params": params, "momentum": [np.zeros_like(p) for p in params]}

    def objective(params, batch):
        x, y = batch
        for weight in params[:-1]:
            x = jax.nn.relu(x @ weight)
        logits = jax.nn.log_softmax(x @ params[-1])
        return -jnp.take_along_axis(logits, y[:, None], 1).mean()

    def step(batch, state):
        loss, grads = jax.value_and_grad(objective)(state["params"], batch)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["momentum"], grads)
        params = jax.tree.map(lambda p, m: p - 0.01 * m, state["params"], momentum)
        return {"params": params, "momentum": momentum}, loss

    return list(zip(x, y, strict=True)), state, step


def cases(batches, state, step):
    """``{name: function that trains for one epoch}``."""

    @partial(jax.jit, donate_argnums=0)
    def by_hand(carry, batch):
        state, total = carry
        state, loss = step(batch, state)
        return state, total + loss

    def hand():
        carry = jax.device_put((state, np.float32(0)))
        carry = jax.tree.map(jnp.copy, carry)
        for batch in batches:
            carry = by_hand(carry, batch)
        return float(carry[1]) / len(batches)

    stacked = jax.device_put(jax.tree.map(lambda *b: np.stack(b), *batches))

    @jax.jit
    def whole(state, stacked):
        return jax.lax.scan(lambda s, b: step(b, s), state, stacked)[1].mean()

    def emitting(batch, state):
        state, loss = step(batch, state)
        return jl.emit(state, loss=loss)

    loop = jl.loop(emitting).metric(lambda loss: loss, "loss", None, ["loss"])

    return {
        "hand": hand,
        "scan": lambda: float(whole(state, stacked)),
        "jaxloop": lambda: float(loop.run(batches, state).history[0]["loss"]),
    }


def measure(workload, repeats, num_batches):
    """Median microseconds a step of each case."""
    sizes, batch_size, usual = workload
    batches, state, step = make(sizes, batch_size, num_batches or usual)
    runs = cases(batches, state, step)
    values = {name: run() for name, run in runs.items()}  # compiles, and must agree
    assert max(values.values()) - min(values.values()) < 1e-3, values
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - began) / len(batches) * 1e6)
    return {name: statistics.median(one) for name, one in times.items()}


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = {
        name: measure(workload, 2 if options.smoke else 15, 20 if options.smoke else None)
        for name, workload in WORKLOADS.items()
    }
    print(f"{jax.default_backend()}, jax {jax.__version__}; microseconds a step, ratio to hand")
    for name, row in table.items():
        cells = [f"{case} {us:8.1f} ({us / row['hand']:.2f})" for case, us in row.items()]
        print(f"{name:24s}", "  ".join(cells))
    if options.json:
        options.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
