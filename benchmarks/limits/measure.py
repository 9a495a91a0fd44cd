"""Wall time, and CPU time of all threads, of cases that take turns.

costs = alternate({"scan": scan, "trainer": trainer}, repeats=15)
figure = costs.ratio("trainer", "scan", "wall_s")
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

PAUSE_S = 0.005
"""Wait this long before each measurement, until the threads of the case before are idle."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        repeats: How often each case takes its turn.
        smoke: Whether to run only a few steps of each, to check that it runs.
        longer: A factor for the number of epochs of a measurement.
    """

    repeats: int = 15
    smoke: bool = False
    longer: int = 1

    def shorten(self, work):
        """Returns the workload with the number of epochs, or in a smoke run of steps, to run."""
        if not self.smoke:
            return dataclasses.replace(work, epochs=work.epochs * self.longer)
        size = 4 * work.batch_size
        return dataclasses.replace(work, x=work.x[:size], y=work.y[:size], epochs=1)

    def some(self, names):
        """Returns the names of what to measure: in a smoke run, the last one only."""
        return names[-1:] if self.smoke else names

    @property
    def few_repeats(self):
        """The number of repeats of what takes seconds."""
        return min(self.repeats, 1 if self.smoke else 7)


class Figure(NamedTuple):
    """A measured value, and what it was made from, in words.

    The words of a ratio are the two medians, and the ratio of the two best costs.
    """

    value: float
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        title: What is measured, in words.
        measure: Returns a `Figure` by the name of the case.
        bars: The most that a figure may be, by the same name. A figure without a bar is printed
            for information.
        unit: The unit of the figures, or "times" for ratios.
    """

    title: str
    measure: Callable[[Effort], dict[str, Figure]]
    bars: dict[str, float]
    unit: str = "times"


class Cost(NamedTuple):
    """The cost of one call. The CPU time is that of all threads."""

    wall_s: float
    cpu_s: float


def cost(function):
    """Calls a function and returns the `Cost`."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


class Costs(dict):
    """The costs by case, one for each round."""

    def median(self, name, field="wall_s"):
        """Returns the median of a case."""
        return statistics.median(getattr(one, field) for one in self[name])

    def best(self, name, field="wall_s"):
        """Returns the lowest cost of a case, which a load on the machine disturbs least."""
        return min(getattr(one, field) for one in self[name])

    def ratio(self, name, base, field, units=None):
        """Returns the median over the rounds of the ratio to another case.

        The ratios are made within each round, so that a load that lasts for some rounds cancels.

        Args:
            name: The case.
            base: What to compare it with.
            field: "wall_s" or "cpu_s".
            units: How many steps, epochs or the like one measurement has, and their name.
        """
        rounds = zip(self[name], self[base], strict=True)
        ratio = statistics.median(getattr(a, field) / getattr(b, field) for a, b in rounds)
        number, unit = units or (1, "run")
        own, other = (self.median(one, field) / number * 1e6 for one in (name, base))
        best = self.best(name, field) / self.best(base, field)
        return Figure(ratio, f"{own:,.1f} to {other:,.1f} us a {unit}, best {best:.2f}")


def alternate(cases, repeats, measure=cost):
    """Measures the cases in turn, in random order; returns `Costs`."""
    costs, names, order = Costs({name: [] for name in cases}), list(cases), np.random.default_rng(0)
    for _ in range(repeats):
        for name in order.permutation(names):
            time.sleep(PAUSE_S)
            costs[name].append(measure(cases[name]))
    return costs
