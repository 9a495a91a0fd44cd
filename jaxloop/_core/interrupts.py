"""Signals that end a run: SIGTERM and SIGINT (Ctrl-C, or a notebook's interrupt) set a flag.

    with Interrupts() as interrupts:
        while True:
            interrupts.poll()           # raises Interrupted once a signal has arrived
            ...

After the first signal, the run stops at a point where its state is consistent. A second Ctrl-C
stops it immediately. A run inside another run (a validation in a handler) shares the flag of the
outermost run. Nothing changes outside the main thread, where Python cannot set signal handlers, or
for signals that are handled outside Python.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_ENDING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A signal arrived, and the work stopped at a point from which it can restart."""


class Flag:
    """The flag that a signal sets. Nested runs share it.

    Attributes:
        name: The signal that arrived, such as "SIGTERM", or None.
        num_waiting: The number of waits for data that a signal may interrupt immediately.
    """

    __slots__ = ("name", "num_waiting")

    def __init__(self) -> None:
        self.name: str | None = None
        self.num_waiting = 0


class Interrupts:
    """Catches SIGTERM and SIGINT from `__enter__` to `__exit__`.

    Attributes:
        flag: The flag that these signals set.
        waiting: A context in which the main thread waits for data, so that a signal raises
            `Interrupted` at once.
        nested: Whether this run is inside another run, which ends too.
    """

    def __init__(self) -> None:
        self.flag = Flag()
        self.waiting = _Waiting(self)
        self.nested = False
        self._before: dict[int, Any] = {}

    def poll(self) -> None:
        """Raises `Interrupted` if a signal has arrived."""
        if self.flag.name is not None:
            raise Interrupted(self.flag.name)

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in _ENDING:
            before = signal.getsignal(number)
            owner = getattr(before, "__self__", None)
            if isinstance(owner, Interrupts):
                self.flag, self.nested = owner.flag, True
            # None means that the handler was not set from Python, such as that of jax.distributed.
            elif before not in (None, signal.SIG_IGN):
                self._before[number] = before
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
        if self.nested:
            self.flag, self.nested = Flag(), False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Restores the previous signal handlers while the caller's code runs."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _receive(self, number: int, frame: Any) -> None:
        flag = self.flag
        again = flag.name is not None
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        before = self._before[number]
        if not again:
            flag.name = signal.Signals(number).name
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)  # the script's own handler, which may raise too
        if flag.num_waiting and not again:
            raise Interrupted(flag.name)


class _Waiting:
    __slots__ = ("_interrupts",)

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    def __enter__(self) -> None:
        self._interrupts.poll()
        self._interrupts.flag.num_waiting += 1

    def __exit__(self, *exc: object) -> None:
        self._interrupts.flag.num_waiting -= 1
