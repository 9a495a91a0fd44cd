"""The display of one run: which form it has, and what it is told.

    meter = Meter(start.snapshot, num_examples(start.sample))
    display = Display(form_of(nested=False, plot=False), meter, start, summarizes=True)
    display.at_time(snapshot)
    display.close()

Invariant: a display that cannot be written, such as that of a terminal that was closed, is given
up, and the run continues.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from jaxloop._core.events import Event
from jaxloop._core.state import Snapshot
from jaxloop._core.types import PyTree
from jaxloop._progress.lines import Lines
from jaxloop._progress.meter import Meter, View, clock
from jaxloop._progress.summary import Summary, summary
from jaxloop._spec import RunStart

logger = logging.getLogger("jaxloop")

_LEAST_WIDTH = 24
"""In columns. In a narrower terminal, bars would wrap and could not be erased."""

ENDS_EPOCH = (Event.EPOCH_COMPLETED, Event.EPOCH_HALTED)
ENDS_RUN = (Event.COMPLETED, Event.HALTED)


class Form(Protocol):
    """A way to show progress."""

    live: bool
    """Whether it shows more than lines, so that it wants to be told the time."""

    def start(self, view: View) -> None:
        """Begins to show the run."""

    def draw(self, view: View) -> None:
        """Shows what has changed, unless that was done too recently."""

    def batch(self, snapshot: Snapshot) -> None:
        """Shows every n-th iteration."""

    def epoch(self, snapshot: Snapshot, view: View, seconds: float) -> None:
        """Shows an epoch that has ended."""

    def finish(self, shown: Summary | None, failure: str) -> None:
        """Shows the end of the run.

        Args:
            shown: The summary, if it is wanted and the run ended in order.
            failure: What ended the run, if it did not end in order, or "".
        """

    def release(self) -> None:
        """Gives back what it has taken, without showing anything."""


class Display:
    """The display of one run.

    Args:
        form: How it is shown.
        meter: What is shown.
        start: What is known before the first event.
        summarizes: Whether a summary ends it.
    """

    def __init__(self, form: Form, meter: Meter, start: RunStart, *, summarizes: bool) -> None:
        self._form, self._meter = form, meter
        self._start, self._summarizes = start, summarizes
        self._epoch_began_s = clock()
        self._last: Snapshot | None = None
        self._failure: BaseException | None = None
        self._broken = False
        self._try(lambda: form.start(self._meter.now()))

    @property
    def is_live(self) -> bool:
        """Whether it wants to be told the time, and not every n-th iteration."""
        return self._form.live

    def at_batch(self, snapshot: Snapshot) -> None:
        """Shows every n-th iteration of an epoch."""
        self._try(lambda: self._form.batch(snapshot))

    def at_time(self, snapshot: Snapshot) -> None:
        """Shows the run as it is now."""
        self._meter.see(snapshot)
        self._try(lambda: self._form.draw(self._meter.now()))

    def __call__(self, snapshot: Snapshot) -> None:
        """Shows the end of an epoch or of the run."""
        if snapshot.event in ENDS_RUN:
            self._last = snapshot
        elif snapshot.event in ENDS_EPOCH:
            if self._form.live:
                self._meter.see(snapshot)
            now_s = clock()
            seconds, self._epoch_began_s = now_s - self._epoch_began_s, now_s
            self._try(lambda: self._form.epoch(snapshot, self._meter.now(), seconds))

    def fail(self, error: BaseException) -> None:
        """Keeps the error that ends the run."""
        self._failure = error

    def close(self) -> None:
        """Ends the display with the summary, which then counts the last saves too."""
        shown, failure = None, ""
        if self._failure is not None:
            failure = f"ended by {type(self._failure).__name__}"
        elif self._last is None:
            failure = "left before its end"
        elif self._summarizes:
            writes = [
                (one.name, one.writes_to)
                for one in self._start.loop.attachments
                if one.writes_to is not None
            ]
            shown = summary(self._last, better_of=self._start.better_of, writes=writes)
        self._try(lambda: self._form.finish(shown, failure))

    def _try(self, show: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            show()
        except OSError as error:
            self._broken = True
            with contextlib.suppress(OSError):
                self._form.release()
            logger.warning(
                "progress is not shown any more, because it cannot be written: %s", error
            )


def form_of(*, nested: bool, plot: bool) -> Form:
    """Returns how progress can be shown where standard output goes.

    Args:
        nested: Whether the run is inside another one, whose display is there already.
        plot: Whether a notebook also shows a curve.
    """
    stream: Any = sys.stdout
    if nested or stream is None:
        return Lines()
    if is_notebook(stream):
        # Imported here, because most runs are not in a notebook.
        from jaxloop._progress.notebook import Notebook

        return Notebook(plot=plot)
    if os.environ.get("TERM", "").lower() in ("", "dumb", "unknown") or not stream.isatty():
        return Lines()
    # Imported here, because it imports rich, which only a terminal needs.
    from jaxloop._progress.terminal import Terminal, console_of

    console = console_of(stream)
    if console is None or console.width < _LEAST_WIDTH:
        return Lines()
    terminal = Terminal(console)
    return terminal if terminal.claim() else Lines()


def is_notebook(stream: object) -> bool:
    """Returns whether a stream is the output of a cell in Jupyter, Colab and the like."""
    # A kernel has imported this module. Nothing else has such a stream.
    iostream = sys.modules.get("ipykernel.iostream")
    return iostream is not None and isinstance(stream, iostream.OutStream)


def num_examples(batch: PyTree) -> int | None:
    """Returns the number of examples in a batch, or None if its arrays do not agree on it.

    Example:
        >>> num_examples((np.zeros((32, 8)), np.zeros(32))), num_examples({"a": 1.0})
        (32, None)
    """
    lengths = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)}
    return lengths.pop() if len(lengths) == 1 else None
