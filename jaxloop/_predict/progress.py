"""How far a prediction is, as a line, or for a function of the user.

    report = reporter(True)
    report(3, 40)                   # predicted 3 of 40 batches

Invariant: no clock is read. What is written depends on the numbers of batches alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeAlias

from jaxloop._core.checks import check_callable

Progress: TypeAlias = bool | Callable[[int, int | None], None]
"""Whether to print progress, or a function of the number of batches done and of all batches."""


def reporter(progress: Progress) -> Callable[[int, int | None], None]:
    """Returns the function that gets the number of batches done, and of all if it is known.

    Raises:
        ArgumentTypeError: ``progress`` is no bool and no function.
    """
    if progress is True:
        return _Line()
    if progress is False:
        return lambda done, total: None
    check_callable("predictor", "progress", progress)
    return progress


class _Line:
    """Prints progress: in a terminal one line that changes, elsewhere a line each tenth."""

    def __init__(self) -> None:
        self._last = -1
        self._live = sys.stdout.isatty()

    def __call__(self, done: int, total: int | None) -> None:
        # Without a clock: each hundredth or tenth of the data, or powers of two.
        part = done.bit_length() if total is None else done * (100 if self._live else 10) // total
        if part == self._last:
            return
        self._last = part
        text = f"predicted {done}{'' if total is None else f' of {total}'} batches"
        ended = done == total or total is None
        if self._live:
            print(f"\r{text}", end="\n" if ended else "", flush=True)
        else:
            print(text, flush=True)
