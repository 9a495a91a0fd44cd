"""The clock of a run, which measures how the seconds of an epoch and of the run are spent.

    clock = RunClock()
    began = now()
    ...                                     # wait for data
    clock.epoch.data_s += now() - began
    ended = clock.end_epoch(marker)         # the device may still be working
    ended.get()                             # an `EpochTime`; waits for the marker

The engine runs ahead of the device, so an epoch ends when its last block does. Reading the time
waits for that. If it is not read, the engine records it when it waits for the block anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from jaxloop._core.times import EpochTime

now = time.perf_counter

ValueT = TypeVar("ValueT")

_PARTS = ("data_s", "compile_s", "dispatch_s", "validation_s", "handlers_s", "saves_s")


class EpochClock:
    """The seconds of one epoch.

    Args:
        elapsed_s: The seconds that it took in earlier runs.
        before: The clock of the previous epoch, whose last block may still be running.
    """

    def __init__(self, elapsed_s: float = 0.0, before: EpochClock | None = None) -> None:
        self.began_s = now() - elapsed_s
        self.data_s = self.compile_s = self.dispatch_s = 0.0
        self.validation_s = self.handlers_s = self.saves_s = 0.0
        self._before = before
        self._marker: Any = None
        self._after: EpochClock | None = None
        self._end_s = 0.0
        self._ended: float | None = None
        self._time: EpochTime | None = None

    def end(self, marker: Any, after: EpochClock) -> None:
        """Ends the epoch as soon as ``marker`` is ready, or now if it is None.

        Args:
            marker: An array that is ready when the last block of the epoch is done.
            after: The clock of what follows, such as a validation. While a handler runs, nobody
                sees when the marker gets ready, so the time of handlers is not the epoch's.
        """
        self._marker, self._after, self._end_s = marker, after, now()
        if marker is None:
            self.settle()

    def poll(self) -> None:
        """Records that the epoch's last block is done, if it is."""
        if self._marker is not None and self._marker.is_ready():
            self.settle()

    def settle(self) -> None:
        """Records that the epoch's last block is done."""
        if self._ended is None:
            after = self._after
            assert after is not None
            handlers_s = after.validation_s + after.handlers_s + after.saves_s
            self._ended = max(self._end_s, now() - handlers_s)
            self._marker = self._after = None
            if self._before is not None and self._before._ended is not None:
                self.began_s = max(self.began_s, self._before._ended)
            self._before = None

    def get(self) -> EpochTime:
        """Returns the time, which is final once it has been read."""
        if self._time is None:
            if self._marker is not None:
                self._marker.block_until_ready()
            self.settle()
            assert self._ended is not None
            parts = {name: getattr(self, name) for name in _PARTS}
            self._time = EpochTime(self._ended - self.began_s, **parts)
        return self._time


class RunClock:
    """The clock of a run, which is one session.

    Attributes:
        began_s: When the run began, on the scale of `now`.
        epoch: The clock of the current epoch. Between two epochs, it is one of its own.
        by_handler: The seconds of each attachment by its name.
        waited_s: The seconds in which the attachment that runs has waited for the device. Code
            that begins to measure an attachment sets it to 0, and `add` leaves it out.
    """

    def __init__(self) -> None:
        self.began_s = now()
        self.waited_s = 0.0
        self.epoch = EpochClock()
        self.by_handler: dict[str, float] = {}
        self._unix_s = time.time()
        self._start_s: float | None = None
        self._away_s = 0.0
        self._ended: float | None = None
        self._spent = dict.fromkeys(_PARTS, 0.0)

    def start(self) -> None:
        """Records that the first event is about to fire."""
        self._start_s = now() - self.began_s

    def end(self) -> None:
        """Records that the run has ended."""
        self._ended = now()

    def leave_out(self, seconds: float) -> None:
        """Leaves out seconds in which the caller's code ran."""
        self._away_s += seconds

    def add(self, part: str, name: str, seconds: float) -> None:
        """Adds the seconds of an attachment to a part of the epoch.

        If it read a metric, the device may have had to finish a block first. Those seconds are the
        device's.
        """
        seconds -= self.waited_s
        self.waited_s = 0.0
        # A dict, because an observer may see every iteration and each call counts.
        self.epoch.__dict__[part] += seconds
        if name in self.by_handler:
            self.by_handler[name] += seconds
        else:
            self.by_handler[name] = seconds

    def wait(self, read: Callable[[], ValueT]) -> ValueT:
        """Returns what ``read`` returns, which waits for the device."""
        began = now()
        try:
            return read()
        finally:
            self.waited_s += now() - began

    def session_parts(self) -> dict[str, Any]:
        """Returns the arguments of a `Session`, as of now, without the steps."""
        elapsed_s = (now() if self._ended is None else self._ended) - self.began_s - self._away_s
        return {
            "began": self._unix_s,
            "elapsed_s": elapsed_s,
            "start_s": elapsed_s if self._start_s is None else self._start_s,
            **{name: self._spent[name] + getattr(self.epoch, name) for name in _PARTS},
            "by_handler": dict(self.by_handler),
        }

    def continue_epoch(self, elapsed_s: float) -> None:
        """Continues an epoch that took ``elapsed_s`` in an earlier run."""
        self.epoch = EpochClock(elapsed_s)

    def begin_epoch(self) -> None:
        """Begins an epoch."""
        for name in _PARTS:
            self._spent[name] += getattr(self.epoch, name)
        self.epoch = EpochClock(before=self.epoch)

    def end_epoch(self, marker: Any) -> EpochClock:
        """Ends the epoch when ``marker`` is ready, or now if it is None. Returns its clock."""
        ended = self.epoch
        self.begin_epoch()
        ended.end(marker, self.epoch)
        return ended
