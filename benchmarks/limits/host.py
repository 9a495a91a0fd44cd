"""What the host does: the reader of an iterator alone, a slow loader, and a single core.

figures = reader(Effort(repeats=15))    # {"MLP 8-8-2": Figure(4.5, "us a batch"), ...}
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import cases
from benchmarks.limits.measure import Figure, Row, alternate
from benchmarks.limits.steady import SMALL, Loader, label
from benchmarks.workloads import WORKLOADS

# Private: no public function reads batches without a device, which would hide the reader's cost.
from jaxloop._core.placement import Placement
from jaxloop._data.readers import Fill, IteratorReader
from jaxloop._data.superbatch import BufferPool

NUM_ROWS, NUM_BATCHES = 64, 1024
READY = np.int32(0)


def read_all(batches, pool):
    """Reads all batches into superbatches, each of which is done before the next is filled."""
    marker = jax.device_put(READY)
    reader = IteratorReader(iter(batches), epoch=0, one_shot=False)
    while True:
        request = Fill(reader, NUM_ROWS, pool, None)
        request.run()
        if request.error is not None:
            raise request.error
        if request.superbatch is None:
            return
        superbatch = request.superbatch
        superbatch.next_row, superbatch.num_left = superbatch.num_left, 0
        superbatch.marker = marker


def batches_of(workload, num_batches, dtype=np.float32):
    """Returns many batches of a workload, of which each epoch has the same."""
    batches = [(x.astype(dtype), y) for x, y in WORKLOADS[workload]().batches]
    return [batches[index % len(batches)] for index in range(num_batches)]


def reader(effort):
    """Measures the CPU time that the reader takes for a batch. No step runs."""
    num_batches = 128 if effort.smoke else NUM_BATCHES
    sources = {name: batches_of(name, num_batches) for name in SMALL}
    large = sources["MLP 64-64-10"]
    for name in SMALL:
        sources[f"{name}, float64"] = batches_of(name, num_batches, np.float64)
    sources["dict"] = [{"x": x, "y": y} for x, y in large]
    sources["jax.Array"] = [jax.device_put(batch) for batch in large]
    try:
        import torch  # optional
    except ImportError:
        pass
    else:
        sources["PyTorch"] = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in large]
    pools = {name: BufferPool(NUM_ROWS, Placement()) for name in sources}
    runs = {
        name: lambda name=name, batches=batches: read_all(batches, pools[name])
        for name, batches in sources.items()
    }
    for run in runs.values():
        run()  # the first touches the memory of the buffers
    copied = {f"copies alone, {name}": copy_of(sources[name]) for name in SMALL}
    runs |= copied
    costs = alternate(runs, effort.repeats)
    scale = 1e6 / num_batches
    return {
        name: Figure(costs.median(name, "cpu_s") * scale, f"wall {costs.median(name) * scale:.2f}")
        for name in runs
    }


def copy_of(batches):
    """Returns a function that copies batches into buffers, which no reader can do without."""
    buffers = [np.zeros((NUM_ROWS, *leaf.shape), leaf.dtype) for leaf in batches[0]]

    def copy():
        for index, (x, y) in enumerate(batches):
            buffers[0][index % NUM_ROWS] = x
            buffers[1][index % NUM_ROWS] = y

    return copy


class SlowLoader(Loader):
    """A loader that takes about a millisecond for a batch.

    Args:
        batches: The batches.
        wait: Takes the time.
    """

    def __init__(self, batches, wait):
        super().__init__(batches)
        self.wait = wait

    def __iter__(self):
        for batch in self.batches:
            self.wait()
            yield batch


def a_millisecond_of_work():
    """Returns a function that works in NumPy for about a millisecond."""
    numbers = np.random.default_rng(0).normal(size=4096)

    def seconds():
        began = time.perf_counter()
        np.sort(numbers)
        return time.perf_counter() - began

    times = max(1, round(1e-3 / min(seconds() for _ in range(20))))

    def work():
        for _ in range(times):
            np.sort(numbers)

    return work


def slow_loader(effort):
    """Compares a run on a loader that takes a millisecond a batch with iterating over it alone."""
    figures, num_batches = {}, 20 if effort.smoke else 600
    waits = {"sleeps": lambda: time.sleep(1e-3), "works": a_millisecond_of_work()}
    for workload in effort.some(SMALL):
        work = dataclasses.replace(WORKLOADS[workload](), epochs=1)
        for name, wait in waits.items():
            loader = SlowLoader(batches_of(workload, num_batches), wait)
            train = cases.train_on(work, cases.own_loop(work), loader)
            train(), train()
            runs = {"loop": train, "alone": lambda loader=loader: list(loader)}
            costs = alternate(runs, effort.few_repeats)
            figures[label(workload, name)] = costs.ratio(
                "loop", "alone", "wall_s", (num_batches, "batch")
            )
    return figures


ONE_CORE = """
import os, runpy, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before jax makes its threads
runpy.run_module("benchmarks.limits", run_name="__main__", alter_sys=True)
"""


def one_core(effort):
    """Measures `host_data` in a process that may use one core."""
    if not hasattr(os, "sched_setaffinity"):
        return {}  # only Linux has it
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figures.json")
        command = [sys.executable, "-c", ONE_CORE, "--case", "host_data", "--json", str(path)]
        command += ["--repeats", str(effort.repeats), "--longer", str(effort.longer)]
        command += ["--smoke"] * effort.smoke
        # On a GPU, this process has taken most of the memory already.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        return {
            one["case"]: Figure(one["value"], one["detail"]) for one in json.loads(path.read_text())
        }


ROWS = {
    "one_core": Row(
        "NumPy batches from the host, against a scan, one core",
        one_core,
        {f"{work}, {kind}": 1.50 for work in SMALL for kind in ("list", "generator", "loader")},
    ),
    "reader": Row(
        "reader of NumPy batches alone, CPU time",
        reader,
        {
            "MLP 8-8-2": 1.2,
            "MLP 64-64-10": 1.9,
            "MLP 8-8-2, float64": 1.5,
            "MLP 64-64-10, float64": 1.5,
        },
        "us a batch",
    ),
    "slow_loader": Row(
        "loader that takes 1 ms a batch, against the loader alone",
        slow_loader,
        {f"{work}, {kind}": 1.02 for work in SMALL for kind in ("sleeps", "works")},
    ),
}
