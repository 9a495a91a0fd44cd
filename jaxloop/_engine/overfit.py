"""Overfitting a batch: the first test of a model, its loss, its data and its optimizer.

    print(overfit(loop, data))

A model that can learn at all learns one batch by heart. If its loss does not fall, something is
wrong, and a long run would not show what.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxloop._core.batch import as_batch
from jaxloop._core.checks import as_number, check_count
from jaxloop._core.tables import aligned
from jaxloop._core.types import DataLike, PyTree
from jaxloop._engine.options import RunOptions
from jaxloop._engine.run import Run
from jaxloop._spec import LoopSpec
from jaxloop.errors import ArgumentTypeError, DataError, MissingMetricError


@dataclasses.dataclass(frozen=True)
class OverfitReport:
    """The result of `Loop.overfit`, which prints as a table.

    Attributes:
        metric: The name of the metric that should fall.
        history: ``{pass: metrics}``, the scalar metrics of each pass over the batches, from 0.
        num_batches: The number of batches.
        steps: The number of steps.
    """

    metric: str
    history: Mapping[int, Mapping[str, float]] = dataclasses.field(repr=False)
    num_batches: int
    steps: int

    @property
    def first(self) -> Mapping[str, float]:
        """The metrics of the first pass."""
        return self.history[min(self.history)]

    @property
    def last(self) -> Mapping[str, float]:
        """The metrics of the last pass."""
        return self.history[max(self.history)]

    @property
    def fell(self) -> bool:
        """Whether the metric is finite to the end, and less at the end than at the beginning."""
        values = [metrics[self.metric] for metrics in self.history.values()]
        return all(map(math.isfinite, values)) and values[-1] < values[0]

    def __str__(self) -> str:
        rows = [("metric", "first pass", "last pass")]
        rows += [(name, f"{self.first[name]:.4g}", f"{self.last[name]:.4g}") for name in self.last]
        return "\n".join([*aligned(rows), self._verdict()])

    def _verdict(self) -> str:
        batches = f"{self.num_batches} batch{'es' * (self.num_batches != 1)}"
        where = f"in {self.steps} steps on {batches}"
        values = [metrics[self.metric] for metrics in self.history.values()]
        if self.fell:
            return f"{self.metric} fell from {values[0]:.4g} to {values[-1]:.4g} {where}"
        bad = next((at for at, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            return f"{self.metric} is {values[bad]} in pass {bad}: try a lower learning rate"
        return (
            f"{self.metric} did not fall {where}: check the targets, the loss, the learning rate, "
            "and whether gradients reach all parameters"
        )


def overfit(
    loop: LoopSpec[Any, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    num_batches: int = 1,
    steps: int = 200,
    metric: str = "loss",
) -> OverfitReport:
    """Trains on the first batches again and again, and reports whether the loss falls.

    It starts fresh, so `resume` and `from_state` are ignored. Only the step and its metrics run.
    Nothing that is attached does, so nothing is validated, written or halted.

    Args:
        loop: The loop. It is not changed.
        data: See `run`. Of a function ``epoch -> iterable``, epoch 0. A one-shot iterator loses the
            batches that are read.
        init_state: See `run`.
        num_batches: The number of batches, at least 1.
        steps: The number of steps, rounded up to whole passes over the batches.
        metric: The name of the metric that should fall.

    Returns:
        A report that prints as a table. In a test, ``assert loop.overfit(data).fell``.

    Raises:
        ArgumentError: ``num_batches`` or ``steps`` is less than 1.
        ArgumentTypeError: ``data`` are not batches.
        DataError: ``data`` are empty.
        MissingMetricError: The loop has no scalar metric of this name.

    Example:
        >>> import jaxloop as jl
        >>> step = lambda batch, w: jl.emit(w + 0.1 * (batch - w), loss=(batch - w) ** 2)
        >>> loop = jl.loop(step).metric("loss", per="batch")
        >>> print(loop.overfit([1.0, 9.0], 0.0, steps=50))
        metric  first pass  last pass
        loss    1           3.279e-05
        loss fell from 1 to 3.279e-05 in 50 steps on 1 batch
    """
    check_count("num_batches", num_batches, at_least=1, where="overfit")
    check_count("steps", steps, at_least=1, where="overfit")
    batches = list(itertools.islice(_batches(data), num_batches))
    if not batches:
        raise DataError(
            "overfit: data must have at least one batch, got empty data",
            fix="pass at least one batch",
        )
    passes = math.ceil(steps / len(batches))
    spec = loop.replace(attachments=(), start=None, resume_path=None, best_from=None)
    current = Run(spec, batches, init_state, RunOptions.of({"epochs": passes}))
    _check_metric(metric, current.parts.blocks.metric_names)
    state = current.finish()
    history = {epoch: _numbers(metrics) for epoch, metrics in state.history.items()}
    if not history:
        raise KeyboardInterrupt  # the only way to end without a pass
    _check_metric(metric, history[0])
    return OverfitReport(metric, history, len(batches), state.step)


def _check_metric(metric: str, known: Collection[str]) -> None:
    if metric not in known:
        raise MissingMetricError(
            f"overfit: metric must be the name of a scalar metric, got {metric!r}; the loop has: "
            f"{', '.join(sorted(known)) or 'none'}",
            fix="pass the metric= that should fall, or attach it with loop.metric",
        )


def _batches(data: Any) -> Iterator[PyTree]:
    """Yields copies of the batches of epoch 0, because a loader may reuse its memory."""
    if callable(data) and not hasattr(data, "__iter__"):
        data = data(0)
    if isinstance(data, str | bytes) or not hasattr(data, "__iter__"):
        raise ArgumentTypeError(
            f"overfit: data must be an iterable of batches, got {type(data).__name__}",
            fix="pass batches; for arrays in memory, use jl.batches((x, y), batch_size)",
        )
    for index, batch in enumerate(data):
        yield jax.tree.map(_copied, as_batch(batch, f"overfit: batch {index}").value)


def _copied(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: as_number(value) for name, value in metrics.items()}
    return {name: number for name, number in numbers.items() if number is not None}
