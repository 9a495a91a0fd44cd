"""The rows of the table, and how they are measured, printed and drawn.

figures = measure(["trainer", "metrics"], Effort(repeats=15))
print_table(figures)
"""

import dataclasses
import os
import platform
import time

import jax

from benchmarks.limits import host, processes, saves, steady, validation

ROWS = {**steady.ROWS, **host.ROWS, **processes.ROWS, **validation.ROWS, **saves.ROWS}


@dataclasses.dataclass(frozen=True)
class Result:
    """A figure with its row, its bar (or None) and its unit."""

    row: str
    case: str
    value: float
    bar: float | None
    unit: str
    detail: str

    @property
    def verdict(self):
        """Whether the bar is met, in words."""
        if self.bar is None:
            return ""
        return "met" if self.value <= self.bar else "MISSED"


def machine():
    """Describes the machine and how busy it is. Figures of wall time need two idle cores."""
    return (
        f"{jax.default_backend()}, {os.cpu_count()} cores with a load of {os.getloadavg()[0]:.1f}, "
        f"jax {jax.__version__}, Python {platform.python_version()}"
    )


def measure(names, effort):
    """Measures rows, prints each figure, and returns the results."""
    results = []
    for name in names:
        row, began = ROWS[name], time.perf_counter()
        print(f"\n{name}: {row.title}", flush=True)
        for case, figure in row.measure(effort).items():
            result = Result(name, case, figure.value, row.bars.get(case), row.unit, figure.detail)
            results.append(result)
            bar = "" if result.bar is None else f"bar {result.bar:g}"
            print(f"  {case:34s}{_number(result):>16s}  {bar:9s}{result.verdict:8s}{result.detail}")
        print(f"  ({time.perf_counter() - began:.0f} s)", flush=True)
    return results


def _number(result):
    number = f"{result.value:.3g}" if result.value >= 10 else f"{result.value:.2f}"
    if result.unit == "executables":
        number = str(result.value)
    return number if result.unit in ("times", "executables") else f"{number} {result.unit}"


def print_table(results):
    """Prints the table in Markdown."""
    print("\n| case | measured | bar |\n|---|---:|---:|")
    row = None
    for one in results:
        if one.row != row:
            row = one.row
            print(f"| **{ROWS[row].title}** | | |")
        bar = "" if one.bar is None else f"{one.bar:g}"
        print(f"| {one.case} | {_number(one)} | {bar} |")


def as_json(results):
    """Returns the results as a list of dicts."""
    return [dataclasses.asdict(one) for one in results]


def draw(path, results):
    """Draws the picture of the results."""
    # Imported here, because only the picture needs Matplotlib.
    from benchmarks.limits import picture

    picture.draw(path, results, {name: row.title for name, row in ROWS.items()})
