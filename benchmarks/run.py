"""Compares jaxloop with hand-written loops, a bare scan and other libraries, in one process.

    python -m benchmarks.run                    # all cases, and the libraries that are installed
    python -m benchmarks.run --smoke            # a few steps of each, to check that it runs
    python -m benchmarks.run --workload "MLP 64-64-10" --case hand,scan,jaxloop --repeats 31
    python -m benchmarks.run --each-alone --json out.json --plot out.png

The cases take turns. The table shows the median of each, in microseconds per step, and its ratio
to the hand-written loop. A measurement is a whole training run, including the work that a library
does at its start and end. `first` is the time from creating a case to the end of its first
measurement, including compilation. `peak` is the peak memory of a process that runs only the case.

A run of all cases ends with the table of `python -m benchmarks.limits`.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxloop as jl
from benchmarks.cases import CASES
from benchmarks.peers import PEERS
from benchmarks.timing import interleaved, memory_mb
from benchmarks.workloads import WORKLOADS

BASE = {
    "jaxloop_shuffled": "hand_shuffled",
    "jaxloop_five_metrics": "jaxloop_one_metric",
    "jaxloop_ten_metrics": "jaxloop_one_metric",
    "jaxloop_objective": "jaxloop",
}
"""Compare these cases with another case too, in addition to `hand`."""


def prepare(work, names):
    """Returns ``{case: train}`` for the cases that run here. Each has trained once."""
    trains = {}
    for name in names:
        try:
            train = {**CASES, **PEERS}[name](work)
            if train is None:
                print(f"  {name}: not written for this workload")
                continue
            loss = train()
        except ImportError as error:
            print(f"  {name}: skipped, {error}")
            continue
        assert np.isfinite(loss), (name, loss)
        trains[name] = train
    return trains


def compare(work, names, repeats):
    """Returns ``{case: microseconds per step}``."""
    seconds = interleaved(prepare(work, names), repeats, pause_after=PEERS)
    return {name: one / work.num_steps * 1e6 for name, one in seconds.items()}


def reduction(iterations, repeats):
    """Compares a loop without data with `lax.fori_loop`; returns milliseconds."""

    def advance(state):
        return state[0] + 1, state[1] + state[0] * 0.5, state[2] * 0.999 + 1

    first = (np.float32(0),) * 3
    loop = jl.loop(lambda _, state: advance(state))
    bare = jax.jit(lambda s: jax.lax.fori_loop(0, iterations, lambda _, s: advance(s), s))
    cases = {
        "fori_loop": lambda: jax.block_until_ready(bare(first)),
        "jaxloop": lambda: loop.run(None, first, iterations=iterations),
    }
    for case in cases.values():
        case()
    return {name: one * 1e3 for name, one in interleaved(cases, repeats).items()}


def growth(iterations):
    """Returns by how many MB a long run with handlers grows after its warm-up."""
    loop = jl.loop(lambda batch, total: jl.emit(total + jnp.sum(batch), x=batch))
    loop = loop.metric(lambda x: x, "mean", None, ["x"])
    loop = loop.observe("iteration_completed", lambda s: s.metrics["mean"], jl.every(100))
    for index in range(5):
        loop = loop.handle("iteration_completed", lambda s: None, jl.every(500 + index))
    data = [np.ones(4, np.float32)] * 1000
    for _ in range(2):
        loop.run(data, 0.0, epochs=max(1, iterations // 4000))
    before = memory_mb()
    loop.run(data, 0.0, epochs=max(1, iterations // 1000))
    return memory_mb() - before


def startup(repeats):
    """Compares the import with that of JAX, and the compile time with that of a bare step."""

    def process(code):
        command = [sys.executable, "-c", code]
        return lambda: subprocess.run(command, check=True, capture_output=True)

    imports = interleaved(
        {
            "import jax, optax": process("import jax, optax"),
            "import jaxloop": process("import jaxloop"),
        },
        repeats,
    )
    work = WORKLOADS["MLP 64-64-10"]()
    first = work.init()

    def bare():
        jax.clear_caches()
        step = jax.jit(work.step, donate_argnums=1)
        step.lower(work.batches[0], first).compile()

    def ours():
        jax.clear_caches()
        jl.loop(emitting).metric(lambda loss: loss, "loss", None, ["loss"]).check(
            work.batches, first
        )

    def emitting(batch, state):
        state, loss = work.step(batch, state)
        return jl.emit(state, loss=loss)

    compiles = interleaved({"jax.jit": bare, "jaxloop": ours}, repeats)
    return {**imports, **{f"compile, {name}": one for name, one in compiles.items()}}


def alone(workload, case):
    """Returns the first time and the peak memory of one case, run in a separate process."""
    command = [sys.executable, "-m", "benchmarks.run", "--alone", workload, case]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else None


def print_alone(workload, case):
    """Runs one case and prints the line that `alone` reads."""
    began = time.perf_counter()
    train = {**CASES, **PEERS}[case](dataclasses.replace(WORKLOADS[workload](), epochs=1))
    assert train is not None
    train()
    first_s = time.perf_counter() - began
    status = Path("/proc/self/status").read_text()  # `getrusage` includes the parent's peak
    peak_mb = int(status.split("VmHWM:")[1].split()[0]) / 1e3
    print(json.dumps({"first_s": first_s, "peak_mb": peak_mb}))


def draw(path, table):
    """Draws one panel per workload, with one bar per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(table), figsize=(4 * len(table), 5), layout="constrained")
    for axis, (workload, row) in zip(np.atleast_1d(axes), table.items(), strict=True):
        names = list(row)[::-1]
        colors = ["tab:orange" if name.startswith("jaxloop") else "tab:gray" for name in names]
        axis.barh(names, [row[name] for name in names], color=colors)
        axis.set(title=workload, xlabel="microseconds per step", xscale="log")
    figure.savefig(path, dpi=120)


def measure_limits(repeats, smoke, plot):
    """Prints the table of `benchmarks.limits` and returns it; draws it beside the other picture."""
    # Imported here, because Orbax comes with it, which would count in the memory of `--alone`.
    from benchmarks.limits import report
    from benchmarks.limits.measure import Effort

    print(f"\nlimits: {report.machine()}")
    results = report.measure(report.ROWS, Effort(repeats, smoke))
    report.print_table(results)
    if plot:
        report.draw(plot.with_stem(f"{plot.stem}_limits"), results)
    return report.as_json(results)


def parse():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, to check that it runs")
    parser.add_argument("--workload", help=f"comma-separated, from: {', '.join(WORKLOADS)}")
    parser.add_argument("--case", help=f"comma-separated, from: {', '.join([*CASES, *PEERS])}")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--each-alone", action="store_true", help="add first time and peak memory")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Runs the benchmark and prints the tables."""
    options = parse()
    if options.alone:
        print_alone(*options.alone)
        return
    workloads = options.workload.split(",") if options.workload else list(WORKLOADS)
    if options.smoke and not options.workload:
        workloads = workloads[1:2]
    names = options.case.split(",") if options.case else [*CASES, *PEERS]
    repeats = 1 if options.smoke else options.repeats
    machine = f"{jax.default_backend()}, {os.cpu_count()} cores, jax {jax.__version__}, "
    machine += f"Python {platform.python_version()}"
    print(machine)
    result = {"machine": machine, "us_a_step": {}, "alone": {}}
    for workload in workloads:
        work = WORKLOADS[workload]()
        if options.smoke:
            size = 4 * work.batch_size
            work = dataclasses.replace(work, x=work.x[:size], y=work.y[:size], epochs=1)
        print(f"\n{workload}, batch {work.batch_size}: {work.num_steps} steps a measurement")
        row = result["us_a_step"][workload] = compare(work, names, repeats)
        facts = {name: alone(workload, name) for name in row} if options.each_alone else {}
        result["alone"][workload] = facts
        for name, us in row.items():
            line = f"  {name:22s}{us:10.1f} us"
            if "hand" in row:
                line += f"{us / row['hand']:8.2f} of hand"
            if "scan" in row:
                line += f"{us / row['scan']:8.2f} of scan"
            if facts.get(name):
                fact = facts[name]
                line += f"   first {fact['first_s']:5.2f} s   peak {fact['peak_mb']:5.0f} MB"
            if BASE.get(name) in row:
                line += f"   {us / row[BASE[name]]:.2f} of {BASE[name]}"
            print(line, flush=True)
    if not options.case:
        few = options.smoke
        result["reduction_ms"] = row = reduction(1000 if few else 1_000_000, repeats)
        print(f"\nwithout data: {', '.join(f'{name} {ms:.2f} ms' for name, ms in row.items())}")
        result["growth_mb"] = growth(4000 if few else 200_000)
        print(f"memory after {4 if few else 200},000 iterations: {result['growth_mb']:+.2f} MB")
        result["startup_s"] = row = startup(1 if few else 7)
        print("start-up: " + ", ".join(f"{name} {s:.2f} s" for name, s in row.items()))
        result["limits"] = measure_limits(repeats, few, options.plot)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    if options.plot:
        draw(options.plot, result["us_a_step"])


if __name__ == "__main__":
    main()
