"""The clock of a run: where the seconds of an epoch go.

    clock = EpochClock()
    began = now()
    ...                                     # wait for data
    clock.data_s += now() - began
    clock.end(marker)                       # the device may still be at work
    clock.get()                             # an `EpochTime`; waits for the marker

The driver runs ahead of the device, so an epoch ends when its last block does: whoever reads the
time waits for that, and where nobody does, the driver finds it when it waits for the block anyway.
"""

from __future__ import annotations

import time
from typing import Any

from jaxloop._core.state import EpochTime

now = time.perf_counter


class EpochClock:
    """The seconds of one epoch.

    Args:
        elapsed_s: What it took in earlier runs.
        before: The clock of the epoch before, whose last block may still be running.
    """

    def __init__(self, elapsed_s: float = 0.0, before: EpochClock | None = None) -> None:
        self.began = now() - elapsed_s
        self.data_s = self.dispatch_s = self.handlers_s = 0.0
        self._before = before
        self._marker: Any = None
        self._ended: float | None = None
        self._time: EpochTime | None = None

    def end(self, marker: Any) -> None:
        """Ends the epoch as soon as ``marker`` is ready; None: now."""
        self._marker = marker
        if marker is None:
            self.settle()

    def settle(self) -> None:
        """Says that the epoch's last block is done."""
        if self._ended is None:
            self._ended = now()
            self._marker = None
            if self._before is not None and self._before._ended is not None:
                self.began = max(self.began, self._before._ended)
            self._before = None

    def get(self) -> EpochTime:
        """The time, as it is known for good."""
        if self._time is None:
            if self._marker is not None:
                self._marker.block_until_ready()
            self.settle()
            assert self._ended is not None
            self._time = EpochTime(
                self._ended - self.began, self.data_s, self.dispatch_s, self.handlers_s
            )
        return self._time

    @property
    def elapsed_s(self) -> float:
        """The seconds so far."""
        return now() - self.began
