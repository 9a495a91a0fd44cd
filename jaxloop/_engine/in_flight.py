"""The blocks that the device may not have finished, and how long the next one may be.

    in_flight = InFlight()
    in_flight.use(program, programs.block_lengths)
    in_flight.add(marker, count, now())
    in_flight.settle(MOST_IN_FLIGHT)        # waits for the device
    in_flight.length                        # of the next block, or None while that is unknown

Only time decides this length. No computed value depends on it.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable
from typing import Any, Protocol

from jaxloop._engine.clock import EpochClock, now

MOST_IN_FLIGHT = 2
"""The maximum number of blocks that the device may not have finished."""
_SHORT_BLOCK_S, _LONG_BLOCK_S, _GROWTH = 0.03, 0.5, 64
"""Logs, interrupts and filters with a clock wait for the end of a block, so blocks must not take
long. A program's first block is one iteration. If a block takes less than `_SHORT_BLOCK_S`, later
blocks are longer, by at most a factor of `_GROWTH`. If it takes more than `_LONG_BLOCK_S`, later
blocks are shorter."""


class Cuts(Hashable, Protocol):
    """An executable whose blocks may not have every length."""

    def cut(self, length: int) -> int:
        """Returns how many of ``length`` iterations the next block has."""


class _Block:
    """A block that the device may not have finished, and the clock of an epoch that ends there."""

    __slots__ = ("clock", "count", "dispatched_s", "marker")

    def __init__(self, marker: Any, count: int, dispatched_s: float) -> None:
        self.marker, self.count, self.dispatched_s = marker, count, dispatched_s
        self.clock: EpochClock | None = None


class InFlight:
    """The blocks in flight.

    Attributes:
        length: The number of iterations that a block may have, as far as time decides it, or None
            before the first block of a program.
    """

    def __init__(self) -> None:
        self.length: int | None = None
        self._blocks: collections.deque[_Block] = collections.deque()
        self._settled_s = 0.0
        self._program: Cuts | None = None
        self._lengths: dict[Any, int] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def use(self, program: Cuts, lengths: dict[Any, int]) -> None:
        """Sets the program of later blocks.

        Args:
            program: The program.
            lengths: The lengths of blocks by program, where the next run finds what was measured.
        """
        self._program, self._lengths = program, lengths
        self.length = lengths.get(program)

    def add(self, marker: Any, count: int, dispatched_s: float) -> None:
        """Adds a block of ``count`` iterations, which is done when ``marker`` is ready."""
        self._blocks.append(_Block(marker, count, dispatched_s))

    def end_epoch(self, clock: EpochClock) -> Any:
        """Lets the last block settle the clock of an epoch. Returns its marker, if there is one."""
        if not self._blocks:
            return None
        self._blocks[-1].clock = clock
        return self._blocks[-1].marker

    def settle(self, most: int) -> None:
        """Waits until at most ``most`` blocks are in flight."""
        while len(self._blocks) > most:
            block = self._blocks.popleft()
            block.marker.block_until_ready()
            settled_s = now()
            if block.clock is not None:
                block.clock.settle()
            block_s = settled_s - max(block.dispatched_s, self._settled_s)
            self._settled_s = settled_s
            self.fit(block.count, block_s)

    def fit(self, count: int, block_s: float) -> None:
        """Updates the length after a block of ``count`` iterations that took ``block_s``."""
        if (program := self._program) is None:
            return
        before = self.length
        length = before or 1
        if block_s > _LONG_BLOCK_S:
            length = max(1, int(count * _LONG_BLOCK_S / block_s))
        elif block_s < _SHORT_BLOCK_S and count >= program.cut(length):
            length = int(count * min(_GROWTH, _SHORT_BLOCK_S / block_s))
        if length != before:
            self.length = self._lengths[program] = length
