"""Measures how far jaxloop is from the limit, where users start from, and prints a table.

    python -m benchmarks.limits                              # every row
    python -m benchmarks.limits --smoke                      # a few steps of each
    python -m benchmarks.limits --case trainer,metrics --repeats 31 --longer 4
    python -m benchmarks.limits --json limits.json --plot limits.png

A ratio is the median of the ratios of interleaved repeats. The CPU time is that of all threads.
The bar is the most that a figure should be.
"""

import argparse
import json
from pathlib import Path

from benchmarks.limits.measure import Effort
from benchmarks.limits.report import ROWS, as_json, draw, machine, measure, print_table


def parse():
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.limits", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps, to check that it runs")
    parser.add_argument("--case", help=f"comma-separated, from: {', '.join(ROWS)}")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--longer", type=int, default=1, help="a factor for the epochs of a run")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw the picture")
    return parser.parse_args()


def main():
    """Runs the benchmark and prints the table."""
    options = parse()
    names = options.case.split(",") if options.case else list(ROWS)
    effort = Effort(1 if options.smoke else options.repeats, options.smoke, options.longer)
    print(machine())
    figures = measure(names, effort)
    print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(as_json(figures), indent=1))
    if options.plot:
        draw(options.plot, figures)


if __name__ == "__main__":
    main()
