"""Signals that end a run: SIGTERM and SIGINT (Ctrl-C, a notebook's interrupt) set a flag.

    with Signals() as signals:
        while True:
            signals.poll()              # raises Interrupted once a signal came
            ...

The first signal lets the run end where its state is whole; a second Ctrl-C ends it at once. Runs
inside of a run (a validation in a handler) share the flag of the outermost one. Where handlers
cannot be set (outside of the main thread), and for a signal that something other than Python looks
after, everything stays as it was.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A signal came, and what was going on was left where it can be begun again."""


class Signals:
    """The flag that SIGTERM and SIGINT set, from `__enter__` to `__exit__`."""

    def __init__(self) -> None:
        self._shared: Signals = self
        self._before: dict[int, Any] = {}
        self._name: str | None = None
        self._readers = 0
        self.reading = Reading(self)

    @property
    def name(self) -> str | None:
        """The signal that came, such as "SIGTERM", or None."""
        return self._shared._name

    @property
    def nested(self) -> bool:
        """Whether this run is inside of another, which ends too."""
        return self._shared is not self

    def poll(self) -> None:
        """Raises `Interrupted` once a signal came."""
        if self._shared._name is not None:
            raise Interrupted(self._shared._name)

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in ENDING:
            before = signal.getsignal(number)
            owner = getattr(before, "__self__", None)
            if isinstance(owner, Signals):
                self._shared = owner
            # None is a handler that was not set from Python, such as that of jax.distributed.
            elif before not in (None, signal.SIG_IGN):
                self._before[number] = before
                signal.signal(number, self._came)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before, self._shared = {}, self

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Everything as it was before; for code of the caller's."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _came(self, number: int, frame: Any) -> None:
        again = self._name is not None
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        before = self._before[number]
        if not again:
            self._name = signal.Signals(number).name
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)  # the script's own; it may also raise
        if self._readers and not again:
            raise Interrupted(self._name)


class Reading:
    """While the main thread waits for data, a signal raises `Interrupted` there and then."""

    __slots__ = ("_signals",)

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    def __enter__(self) -> None:
        self._signals.poll()
        self._signals._shared._readers += 1

    def __exit__(self, *exc: object) -> None:
        self._signals._shared._readers -= 1
