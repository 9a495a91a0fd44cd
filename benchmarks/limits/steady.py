"""Whole runs in one process, against a bare `lax.scan` that computes the same steps.

figures = trainer(Effort(repeats=15))       # {"MLP 8-8-2, wall": Figure(1.6, ...), ...}
"""

import dataclasses

import numpy as np

import jaxloop as jl
from benchmarks import cases
from benchmarks.limits.measure import Row, alternate
from benchmarks.workloads import WORKLOADS

SMALL = ("MLP 8-8-2", "MLP 64-64-10")
FIELDS = {"wall": "wall_s", "CPU": "cpu_s"}


def label(*parts):
    """Returns the name of a case from its parts, of which some may be empty."""
    return ", ".join(filter(None, parts))


def compare(work, effort, base, others, fields=("wall",)):
    """Returns the figures of some cases against another.

    Args:
        work: The workload.
        effort: How much to measure.
        base: Makes the case to compare with.
        others: What makes the other cases, by name.
        fields: "wall", "CPU" or both.
    """
    work = effort.shorten(work)
    trains = {name: make(work) for name, make in {"base": base, **others}.items()}
    for name, train in trains.items():
        assert np.isfinite([train(), train()]).all(), name  # the second uses measured lengths
    costs = alternate(trains, effort.repeats)
    units = work.num_steps, "step"
    return {
        label(name, field if len(fields) > 1 else ""): costs.ratio(
            name, "base", FIELDS[field], units
        )
        for name in others
        for field in fields
    }


def on_small(effort, base, others, fields=("wall",)):
    """Returns the figures of `compare` on both small workloads."""
    return {
        label(workload, name): figure
        for workload in effort.some(SMALL)
        for name, figure in compare(WORKLOADS[workload](), effort, base, others, fields).items()
    }


def in_order(work):
    """Returns the arrays of a workload as batches on the device, in order."""
    return jl.batches((work.x, work.y), work.batch_size, drop_remainder=True, device=True)


def trainer(effort):
    """Compares a trainer with loss and accuracy with the scan, which has no metrics."""
    return on_small(effort, cases.scan, {"": cases.jaxloop_trainer}, ("wall", "CPU"))


def own_step(effort):
    """Compares an own step that reports its loss with the scan."""

    def own(work):
        return cases.train_on(work, cases.own_loop(work), in_order(work))

    return on_small(effort, cases.scan, {"": own}, ("wall", "CPU"))


class Loader:
    """A data loader: an object of the user's with an iterator and a length."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        yield from self.batches


def host_data(effort):
    """Compares batches of NumPy arrays from the host with the scan."""

    def on(data_of):
        return lambda work: cases.train_on(work, cases.own_loop(work), data_of(work.batches))

    kinds = {
        "list": on(lambda batches: batches),
        "generator": on(lambda batches: lambda epoch: (batch for batch in batches)),
        "loader": on(Loader),
    }
    return on_small(effort, cases.scan, kinds)


def shuffled(effort):
    """Compares data that are shuffled in each epoch with a scan that shuffles on the device."""
    work = WORKLOADS["MLP 64-64-10"]()
    large = dataclasses.replace(
        work, x=np.tile(work.x, (11, 1)), y=np.tile(work.y, 11), epochs=work.epochs // 10
    )
    kinds = {
        "scan in order": cases.scan,  # for information: what the shuffle itself costs
        "jl.batches": cases.jaxloop_shuffled,
        "device=True": cases.jaxloop_device,
    }
    sizes = {"4 MB": large, "400 KB": work}
    return {
        f"{size}, {name}": figure
        for size in effort.some(list(sizes))
        for name, figure in compare(sizes[size], effort, cases.scan_shuffled, kinds).items()
    }


def metrics(effort):
    """Compares five and ten metrics with one. The data are on the device, to measure the block."""

    def with_metrics(count):
        return lambda work: cases.train_on(work, cases.metrics_loop(work, count), in_order(work))

    others = {"five": with_metrics(5), "ten": with_metrics(10)}
    return on_small(effort, with_metrics(1), others, ("wall", "CPU"))


def objective(effort):
    """Compares a trainer with an objective with an own step that does the same."""
    fields = ("wall", "CPU")
    return on_small(effort, cases.jaxloop, {"": cases.jaxloop_objective}, fields)


def _both(**bars):
    """Returns the bars by case and workload, from a pair of bars for each name."""
    return {
        label(workload, name): bar
        for name, pair in bars.items()
        for workload, bar in zip(SMALL, pair, strict=True)
    }


ROWS = {
    "trainer": Row(
        "trainer with loss and accuracy over arrays, against a scan",
        trainer,
        _both(wall=(1.25, 1.10), CPU=(1.4, 1.25)),
    ),
    "own_step": Row(
        "own step that reports its loss over arrays, against a scan",
        own_step,
        _both(wall=(1.15, 1.08)),
    ),
    "host_data": Row(
        "NumPy batches from the host, against a scan, all cores",
        host_data,
        {f"{work}, {kind}": 1.15 for work in SMALL for kind in ("list", "generator", "loader")},
    ),
    "shuffled": Row(
        "shuffled in each epoch, against a scan shuffled on the device",
        shuffled,
        {
            f"{size}, {k}": 1.25
            for size in ("400 KB", "4 MB")
            for k in ("jl.batches", "device=True")
        },
    ),
    "metrics": Row(
        "more metrics, against one metric",
        metrics,
        {
            f"{work}, {count}, CPU": bar
            for work in SMALL
            for count, bar in {"five": 1.10, "ten": 1.30}.items()
        },
    ),
    "objective": Row(
        "objective, against the same step by hand",
        objective,
        _both(wall=(1.0, 1.0)),
    ),
}
