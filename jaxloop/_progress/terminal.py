"""Progress in a terminal: bars that are redrawn, above which finished epochs and prints scroll.

    form = Terminal(console)
    form.start(view)
    form.draw(view)
    form.finish(summary, None)              # also restores the cursor

While it shows, what handlers print and log goes above the bars. Invariant: it draws at most ten
times a second, and takes at most a fiftieth of the time.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.style import Style

from jaxloop._core.events import Event
from jaxloop._core.state import Snapshot
from jaxloop._progress.figures import in_seconds, named_numbers, wrapped
from jaxloop._progress.frame import Span, frame
from jaxloop._progress.meter import View, clock
from jaxloop._progress.summary import Summary
from jaxloop._progress.text import text_of

_INTERVAL_S, _IDLE_S = 0.1, 1.0
_MOST_SHARE = 0.02
_MOST_EPOCH_LINES = 3


class Terminal:
    """Progress in a terminal.

    Args:
        console: The console, which is interactive.

    Attributes:
        live: See `Lines`.
    """

    live = True

    def __init__(self, console: Console) -> None:
        self._console = console
        self._frame = _Frame(View())
        self._live = Live(
            self._frame,
            console=console,
            auto_refresh=False,
            # What goes to a file stays there.
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
        )
        self._lock = threading.RLock()
        self._done = threading.Event()
        self._epochs: list[str] = []
        self._next_s = self._drawn_s = 0.0
        self._logs: list[tuple[Any, Any]] = []

    def start(self, view: View) -> None:
        """Shows the bars, until `finish`."""
        outs = (sys.stdout, sys.stderr)
        with self._lock:
            self._frame.set(view)
            self._live.start()
            atexit.register(self._stop)  # a generator that nobody closes must not keep the cursor
            self._route_logs(outs)
            self._redraw()
        threading.Thread(target=self._keep_alive, name="jaxloop-progress", daemon=True).start()

    def draw(self, view: View) -> None:
        """Shows the bars anew, unless that was done too recently."""
        with self._lock:
            self._frame.set(view)
            if clock() >= self._next_s:
                self._redraw()

    def batch(self, snapshot: Snapshot) -> None:
        """Shows nothing, because the bars do."""

    def epoch(self, snapshot: Snapshot, view: View, seconds: float) -> None:
        """Writes the metrics of an epoch above the bars."""
        halted = " (halted)" if snapshot.event is Event.EPOCH_HALTED else ""
        parts = [f"epoch {snapshot.epoch}{halted}", in_seconds(seconds)]
        parts += [f"{name} {value}" for name, value in named_numbers(snapshot.metrics)]
        width = max(20, self._console.width - 1)
        self._epochs += wrapped(parts, width, indent=2, most=_MOST_EPOCH_LINES)
        self.draw(view)

    def finish(self, shown: Summary | None, failure: BaseException | None) -> None:
        """Removes the bars and writes the summary. After a failure, the bars stay."""
        with self._lock:
            self._write_epochs()
            self._live.transient = failure is None and shown is not None
            self._stop()
        if shown is not None:
            headline, *lines = text_of(shown, self._console.width - 1)
            self._console.print(self._readable(headline), style="bold")
            for line in lines:
                self._console.print(self._readable(line))

    # --- drawing -------------------------------------------------------------------------------

    def _redraw(self) -> None:
        began_s = clock()
        if self._epochs:
            self._write_epochs()  # which draws the bars too
        else:
            self._live.refresh()
        self._drawn_s = clock()
        self._next_s = began_s + max(_INTERVAL_S, (self._drawn_s - began_s) / _MOST_SHARE)

    def _write_epochs(self) -> None:
        lines, self._epochs = self._epochs, []
        if lines:
            self._console.print(self._readable("\n".join(lines)))

    def _readable(self, text: str) -> str:
        """Returns text that the terminal can show in its encoding."""
        encoding = self._console.encoding
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _keep_alive(self) -> None:
        """Draws the clock while nothing else happens, such as in a long step or a compilation."""
        while not self._done.wait(_IDLE_S):
            with self._lock:
                if not self._done.is_set() and clock() - self._drawn_s >= _IDLE_S:
                    try:
                        self._frame.pass_time(clock())
                        self._redraw()
                    except (OSError, ValueError):  # the terminal is gone; the run will notice
                        return

    # --- the terminal's state ------------------------------------------------------------------

    def _stop(self) -> None:
        with self._lock:
            self._done.set()
            atexit.unregister(self._stop)
            if not self._live.is_started:
                return
            try:
                if sys.stdout is not None:
                    sys.stdout.flush()  # a line that has no end yet
            finally:
                try:
                    self._live.stop()
                finally:
                    for handler, (before, proxy) in self._logs:
                        if handler.stream is proxy:
                            handler.setStream(before)

    def _route_logs(self, outs: tuple[Any, Any]) -> None:
        """Routes log handlers that write to the terminal above the bars too."""
        for before, proxy in zip(outs, (sys.stdout, sys.stderr), strict=True):
            for handler in _log_handlers():
                if proxy is not before and handler.stream is before:
                    handler.setStream(proxy)
                    self._logs.append((handler, (before, proxy)))


def _log_handlers() -> Iterator[logging.StreamHandler[Any]]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        if isinstance(logger, logging.Logger):
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler):
                    yield handler


class _Frame:
    """What `rich` draws: the lines of a view."""

    def __init__(self, view: View) -> None:
        self._view, self._seen_s = view, clock()
        self._styles: dict[str, Style] = {}

    def set(self, view: View) -> None:
        """Shows another view."""
        self._view, self._seen_s = view, clock()

    def pass_time(self, now_s: float) -> None:
        """Shows the time that has passed since the view was made."""
        self._view, self._seen_s = self._view.later(now_s - self._seen_s), now_s

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ascii_only = options.ascii_only
        for line in frame(self._view, options.max_width, ascii_only=ascii_only):
            for span in line:
                yield Segment(_shown(span, ascii_only), self._style(span.style))
            yield Segment.line()

    def _style(self, style: str) -> Style:
        if style not in self._styles:
            self._styles[style] = Style.parse(style)
        return self._styles[style]


def _shown(span: Span, ascii_only: bool) -> str:
    return span.text.encode("ascii", "replace").decode() if ascii_only else span.text
