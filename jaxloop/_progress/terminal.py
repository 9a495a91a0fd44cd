"""Progress in a terminal: bars that are redrawn, above which finished epochs and prints scroll.

    form = Terminal(console_of(sys.stdout))
    form.start(view)
    form.draw(view)
    form.finish(summary, "")                # also restores the cursor

While it shows, what handlers print and log goes above the bars. Invariant: it draws at most ten
times a second, and takes at most a fiftieth of the time.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

from rich import get_console
from rich.ansi import AnsiDecoder
from rich.console import Console, ConsoleOptions, RenderResult
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

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
_CLAIMING = threading.Lock()
"""Held while a display looks whether the terminal is free."""


def console_of(stream: IO[str]) -> Console | None:
    """Returns the console of a terminal, or None if it cannot redraw what it shows.

    If possible, it is the console of `rich.print`, so that the two do not collide.
    """
    own, shared = Console(file=stream), get_console()
    if not own.is_interactive:
        return None
    return shared if shared.file is stream and shared.is_interactive else own


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
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._lock = threading.RLock()
        self._done = threading.Event()
        self._epochs: list[str] = []
        self._next_s = self._drawn_s = 0.0
        self._redirected = _Redirected(console, self._write_epochs)

    def claim(self) -> bool:
        """Takes the terminal, and returns whether that is possible.

        It is not if another display has it: that of another thread, or one of the script.
        """
        with _CLAIMING:
            return self._redirected.begin()

    def start(self, view: View) -> None:
        """Shows the bars, until `finish`."""
        with self._lock:
            self._frame.set(view)
            self._live.start()
            atexit.register(self.release)  # a generator that nobody closes must not keep the cursor
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

    def finish(self, shown: Summary | None, failure: str) -> None:
        """Removes the bars and writes the summary. After a failure, the bars stay."""
        with self._lock:
            self._write_epochs()
            self._live.transient = not failure
            self.release()
        if shown is not None:
            headline, *lines = text_of(shown, self._console.width - 1)
            self._print(headline, style="bold")
            self._print("\n".join(lines))

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
        with self._lock:
            lines, self._epochs = self._epochs, []
            if lines:
                self._print("\n".join(lines))

    def _print(self, text: str, style: str = "") -> None:
        """Prints text that the terminal can show in its encoding, as it is."""
        encoding = self._console.encoding
        shown = text.encode(encoding, "backslashreplace").decode(encoding)
        self._console.print(Text(shown, style), soft_wrap=True)

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

    def release(self) -> None:
        """Gives the terminal back, and shows the cursor again."""
        with self._lock:
            if self._done.is_set():
                return
            self._done.set()
            atexit.unregister(self.release)
            try:
                self._redirected.end()
            finally:
                self._live.stop()


class _Redirected:
    """Redirects what is written to the terminal to above the bars, also that of log handlers.

    Args:
        console: The console of the bars.
        first: Writes what must come before.
    """

    def __init__(self, console: Console, first: Callable[[], None]) -> None:
        self._console, self._first = console, first
        self._proxies: list[_Above] = []

    def begin(self) -> bool:
        """Redirects standard output and, if it is the terminal too, standard error.

        Returns:
            Whether standard output was not redirected before.
        """
        out, err = sys.stdout, sys.stderr
        if isinstance(out, FileProxy):
            return False
        sys.stdout = self._above(out)
        if err is not None and err.isatty() and not isinstance(err, FileProxy):
            sys.stderr = self._above(err)
        return True

    def _above(self, stream: IO[str]) -> _Above:
        above = _Above(self._console, stream, self._first)
        self._proxies.append(above)
        _redirect_logs(stream, above)
        return above

    def end(self) -> None:
        """Redirects nothing any more."""
        proxies, self._proxies = self._proxies, []
        for proxy in proxies:
            # What the script has put there since stays.
            if sys.stdout is proxy:
                sys.stdout = proxy.rich_proxied_file
            if sys.stderr is proxy:
                sys.stderr = proxy.rich_proxied_file
            _redirect_logs(proxy, proxy.rich_proxied_file)
        for proxy in proxies:
            proxy.end_line()


class _Above(FileProxy):
    """A stream whose lines go above the bars.

    That of `rich` also writes parts of lines, and reads them as markup.

    Args:
        console: The console of the bars.
        file: The stream in whose place it is.
        first: Writes what must come before.
    """

    def __init__(self, console: Console, file: IO[str], first: Callable[[], None]) -> None:
        super().__init__(console, file)
        self._console, self._first = console, first
        self._encoding = console.encoding
        self._decoder = AnsiDecoder()
        self._begun = ""

    def write(self, text: str) -> int:
        """Writes the lines that are complete."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        *lines, self._begun = (self._begun + text).split("\n")
        if lines:
            self._first()
            decoded = Text("\n").join(map(self._decoder.decode_line, lines))
            self._console.print(decoded, soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        """Does nothing, because what is complete is written."""

    def end_line(self) -> None:
        """Writes the line that has begun."""
        if self._begun:
            self.write("\n")

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read-only there too, but for the stubs
        """The encoding of the stream."""
        return self._encoding


def _redirect_logs(before: object, after: Any) -> None:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in logger.handlers if isinstance(logger, logging.Logger) else ():
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(after)


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
