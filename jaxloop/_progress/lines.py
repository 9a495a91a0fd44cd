"""Progress as plain lines, for pipes, files and terminals that cannot redraw.

    form = Lines(sys.stdout)
    form.batch(snapshot)                    # epoch 1, batch 50, loss 0.1234

Invariant: no control characters.
"""

from __future__ import annotations

import sys
from typing import TextIO

from jaxloop._core.state import Snapshot
from jaxloop._progress.meter import View
from jaxloop._progress.summary import Summary
from jaxloop._progress.text import progress_line, text_of


class Lines:
    """Progress as lines on standard output.

    Attributes:
        live: Whether it shows more than lines, so that it wants to be told the time.
    """

    live = False

    def start(self, view: View) -> None:
        """Shows nothing."""

    def draw(self, view: View) -> None:
        """Shows nothing."""

    def batch(self, snapshot: Snapshot) -> None:
        """Writes a line."""
        write_line(progress_line(snapshot))

    def epoch(self, snapshot: Snapshot, view: View, seconds: float) -> None:
        """Writes a line."""
        write_line(progress_line(snapshot))

    def finish(self, shown: Summary | None, failure: str) -> None:
        """Writes the summary, if there is one."""
        if shown is not None:
            write_line("\n".join(text_of(shown)))

    def release(self) -> None:
        """Does nothing."""


def write_line(text: str) -> None:
    """Writes a line to standard output, in whatever encoding it has."""
    # Looked up at each line, because notebooks and tests replace sys.stdout.
    stream: TextIO | None = sys.stdout
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:
        encoding = "ascii" if stream is None else stream.encoding
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
