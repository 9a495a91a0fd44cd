"""A trainer's validation of 10,000 examples, against one jitted scan over the same data.

figures = validation(Effort(repeats=15))    # {"batch 32, jl.batches": Figure(1.9, ...), ...}
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jaxloop as jl
from benchmarks import cases
from benchmarks.limits.measure import Figure, Row, alternate
from benchmarks.workloads import WORKLOADS

NUM_EXAMPLES, EPOCHS = 10_000, 10


def scan_of(work, batches):
    """Returns a function that evaluates loss and accuracy, and waits for them."""
    ragged = len(batches[-1][1]) < len(batches[0][1])
    full, rest = (batches[:-1], batches[-1:]) if ragged else (batches, [])
    stacked = jax.device_put(jax.tree.map(lambda *b: np.stack(b), *full))
    rest, params = jax.device_put((rest, work.init_params()))

    def add(totals, batch, params):
        correct = jnp.argmax(work.apply(params, batch[0]), -1) == batch[1]
        return totals + jnp.stack(
            [work.losses(params, batch).sum(), correct.sum(dtype=jnp.float32)]
        )

    @jax.jit
    def evaluate(params, stacked, rest):
        totals, _ = jax.lax.scan(lambda t, b: (add(t, b, params), None), jnp.zeros(2), stacked)
        for batch in rest:
            totals = add(totals, batch, params)
        return totals / NUM_EXAMPLES

    return lambda: np.asarray(evaluate(params, stacked, rest))


def epochs_of(work, validation_data, epochs):
    """Returns a function that trains epochs of one batch, with validations if there are data."""
    loop, first = cases.trainer_loop(work), work.init()["params"]
    if validation_data is not None:
        loop = loop.validate(validation_data)
    return lambda: loop.final_state(work.batches[:1], first, epochs=epochs)


def validation(effort):
    """Compares epochs with and without a validation; the difference is the validation's time."""
    figures, epochs = {}, 2 if effort.smoke else EPOCHS * effort.longer
    work = WORKLOADS["MLP 64-64-10"]()
    rows = np.random.default_rng(0).integers(0, len(work.x), NUM_EXAMPLES)
    arrays = work.x[rows], work.y[rows]
    for size in effort.some((32, 100)):
        batches = list(jl.batches(arrays, size))
        kinds = {
            "jl.batches": jl.batches(arrays, size),
            "device=True": jl.batches(arrays, size, device=True),
            "list": batches,
        }
        evaluate = scan_of(work, batches)
        runs = {name: epochs_of(work, data, epochs) for name, data in kinds.items()}
        _check(runs["list"](), evaluate, work, batches)
        runs |= {"without": epochs_of(work, None, epochs)}
        runs |= {"scan": lambda evaluate=evaluate: [evaluate() for _ in range(epochs)]}
        for run in runs.values():
            run(), run()
        costs = alternate(runs, effort.repeats)
        figures |= {
            f"batch {size}, {name}, {field}": _extra(costs, name, key, epochs)
            for name in kinds
            for field, key in {"wall": "wall_s", "CPU": "cpu_s"}.items()
        }
    return figures


def _extra(costs, name, key, epochs):
    rounds = zip(costs[name], costs["without"], costs["scan"], strict=True)
    ratios = [(getattr(a, key) - getattr(b, key)) / getattr(c, key) for a, b, c in rounds]
    own = costs.median(name, key) - costs.median("without", key)
    own, scan = own / epochs * 1e6, costs.median("scan", key) / epochs * 1e6
    best = (costs.best(name, key) - costs.best("without", key)) / costs.best("scan", key)
    detail = f"{own:,.0f} to {scan:,.0f} us a validation, best {best:.2f}"
    return Figure(float(np.median(ratios)), detail)


def _check(state, evaluate, work, batches):
    """Checks that both evaluate the same: the scan at the final parameters gives these values."""
    work = dataclasses.replace(work, init_params=lambda: state.step_state["model_state"])
    history = state.history[max(state.history)]
    own = [history["validation_loss"], history["validation_accuracy"]]
    np.testing.assert_allclose(own, scan_of(work, batches)(), rtol=1e-4)


ROWS = {
    "validation": Row(
        "validation of 10,000 examples, against one scan over the same data",
        validation,
        {
            f"batch {size}, {kind}, wall": 1.15
            for size in (32, 100)
            for kind in ("jl.batches", "device=True", "list")
        },
    ),
}
