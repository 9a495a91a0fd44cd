"""Signals that end a run: SIGTERM and SIGINT (Ctrl-C, or a notebook's interrupt) set a flag.

    with Interrupts() as interrupts:
        while True:
            interrupts.poll()           # raises Interrupted once a signal has arrived
            ...
    error = interrupts.error(state)     # what the run raises at its end, or None

After the first signal, the run stops at a point where its state is consistent. A second Ctrl-C
stops it immediately. A run inside another run (a validation in a handler) shares the flag of the
outermost run. Nothing changes outside the main thread, where Python cannot set signal handlers, for
signals that are ignored, and in a forked child, where a signal does what it did before the run.

A handler that the script installed is called as well, and comes back when the run ends. If it
raises, the run ends in order first, and then raises that exception. A handler that was set outside
Python, such as that of `jax.distributed`, comes back too, and gets the signal then.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxloop._core.signal_actions import Action, action, is_ignored, put_back
from jaxloop._core.state import State
from jaxloop.errors import Terminated

_ENDING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal arrived, and the work stopped at a point from which it can restart."""


ENDED_BY_SIGNAL = (Interrupted, Terminated)
"""What a run inside another one raises after a signal. The outer run ends too."""


class Flag:
    """The flag that a signal sets. Nested runs share it.

    Attributes:
        name: The first signal that arrived, such as "SIGTERM", or None.
        numbers: The signals that arrived.
        raised: What the script's own handler of a signal raised, or None.
        num_waiting: The number of waits that a signal may interrupt immediately.
    """

    __slots__ = ("name", "num_waiting", "numbers", "raised")

    def __init__(self) -> None:
        self.name: str | None = None
        self.numbers: set[int] = set()
        self.raised: BaseException | None = None
        self.num_waiting = 0

    @property
    def terminates(self) -> bool:
        """Whether SIGTERM arrived, which ends the script."""
        return signal.SIGTERM in self.numbers


class _Previous(NamedTuple):
    """What a signal did before a run, for Python and for the operating system."""

    handler: Any
    action: Action | None


class Interrupts:
    """Catches SIGTERM and SIGINT from `__enter__` to `__exit__`.

    Attributes:
        flag: The flag that these signals set.
        waiting: A context in which a signal raises `Interrupted` at once, because the main thread
            waits for data or has nothing to lose.
        nested: Whether this run is inside another run, which ends too.
    """

    def __init__(self) -> None:
        self.flag = Flag()
        self.waiting = _Waiting(self)
        self.nested = False
        self._previous: dict[int, _Previous] = {}
        self._undelivered: set[int] = set()
        # The main thread of each process has another id. A forked child inherits the handlers.
        self._thread_id: int | None = None

    def poll(self) -> None:
        """Raises `Interrupted` if a signal has arrived."""
        if self.flag.name is not None:
            raise Interrupted(self.flag.name)

    def error(self, state: State[Any] | None) -> BaseException | None:
        """Returns what a run that a signal ended raises. None if it returns its state."""
        flag = self.flag
        if flag.raised is not None and not self.nested:
            return flag.raised
        if flag.terminates:
            return Terminated(state)
        return Interrupted(flag.name) if self.nested or state is None else None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._thread_id = threading.get_native_id()
        outer, mine = None, []
        for number in _ENDING:
            previous = self._find_previous(number)
            if isinstance(previous, Interrupts):
                outer = previous
            # None: a program that embeds Python handles it.
            elif previous.handler not in (None, signal.SIG_IGN) and not is_ignored(previous.action):
                self._previous[number] = previous
                mine.append(number)
        if outer is not None:
            self.flag, self.nested = outer.flag, True
        elif self.nested:  # the run that it began in has ended
            self.flag, self.nested = Flag(), False
        for number in mine:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        if threading.get_native_id() != self._thread_id:
            return
        try:
            self._restore(signal.SIGTERM)
        finally:  # from here on, Ctrl-C may raise
            self._restore(signal.SIGINT)
            self._thread_id = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Restores the previous signal handlers while the caller's code runs.

        If the caller does not come back, they stay.
        """
        self.__exit__()
        yield
        self.__enter__()

    def _find_previous(self, number: int) -> _Previous | Interrupts:
        """Returns what a signal did before this run, or the run that it belongs to."""
        handler = signal.getsignal(number)
        owner = getattr(handler, "__self__", None)
        if not isinstance(owner, Interrupts):
            return _Previous(handler, action(number))
        if owner._thread_id == self._thread_id:
            return owner
        return owner._previous[number]  # this is a forked child, where the run does not go on

    def _restore(self, number: int) -> None:
        previous = self._previous.get(number)
        # If the script has set another handler since, that one stays.
        if previous is None or getattr(signal.getsignal(number), "__self__", None) is not self:
            return
        signal.signal(number, previous.handler)
        if put_back(number, previous.action) and number in self._undelivered:
            self._undelivered.discard(number)
            signal.raise_signal(number)

    def _receive(self, number: int, frame: Any) -> None:
        handler = self._previous[number].handler
        if threading.get_native_id() != self._thread_id:
            self._pass_on(number, frame)
            return
        flag = self.flag
        again = flag.name is not None
        first = number not in flag.numbers
        if not again:
            flag.name = signal.Signals(number).name
        flag.numbers.add(number)
        self._undelivered.add(number)
        if callable(handler) and handler is not signal.default_int_handler:
            try:
                handler(number, frame)
            except BaseException as error:
                if not first:
                    raise
                flag.raised = error  # raised when the run has saved its state
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if flag.num_waiting and not again:
            raise Interrupted(flag.name)

    def _pass_on(self, number: int, frame: Any) -> None:
        """Does what a signal did before the run: in a forked child, or after the run."""
        previous = self._previous[number]
        if callable(previous.handler):
            previous.handler(number, frame)
            return
        signal.signal(number, previous.handler)
        put_back(number, previous.action)
        signal.raise_signal(number)


class _Waiting:
    __slots__ = ("_interrupts",)

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    def __enter__(self) -> None:
        flag = self._interrupts.flag
        flag.num_waiting += 1
        # Afterwards, so that no signal arrives between the two.
        if flag.name is not None:
            flag.num_waiting -= 1
            self._interrupts.poll()

    def __exit__(self, *exc: object) -> None:
        self._interrupts.flag.num_waiting -= 1
