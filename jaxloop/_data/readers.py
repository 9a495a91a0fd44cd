"""Readers, which hold a position in a data set and fill the next superbatch from there.

    reader = IteratorReader(iter(data), epoch=0, one_shot=False)
    reader = ArrayReader(batches, epoch=0, index=0, epoch_arrays=EpochArrays(None))
    fill = Fill(reader, limit=64, pool=pool, late=None)
    fill.run()                              # here, or in a thread
    fill.superbatch, fill.error

If the data raise an error, it is raised in order: after the superbatch of the preceding batches.
"""

from __future__ import annotations

import queue
from collections.abc import Callable

from jaxloop._data.array_reader import ArrayReader
from jaxloop._data.iterator_reader import IteratorReader
from jaxloop._data.superbatch import BufferPool, Superbatch

Late = Callable[[], bool]
"""Called between batches. Returns whether a superbatch must end with the batches it has."""


class Fill:
    """A request to fill a superbatch, possibly in the thread.

    Attributes:
        superbatch: The result, or None if no batch was left.
        error: The error that the data raised, or None.
        finished: Whether it has run.
        done: Gets an item when it has run in the thread, for another thread that waits.
        late: Called between batches, or None. It may change while the request runs.
    """

    __slots__ = ("done", "error", "finished", "late", "limit", "pool", "reader", "superbatch")

    def __init__(self, reader: Reader, limit: int, pool: BufferPool, late: Late | None) -> None:
        self.reader, self.limit, self.pool = reader, limit, pool
        self.finished = False
        self.done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.late = late
        self.superbatch: Superbatch | None = None
        self.error: BaseException | None = None

    def hurry(self) -> None:
        """Finishes the superbatch with the batches it has."""
        self.late = _always

    def run(self) -> None:
        """Fills the superbatch."""
        try:
            self.superbatch = self.reader.fill(self)
        except BaseException as error:  # the waiting thread raises it
            self.error = error
        self.finished = True


def _always() -> bool:
    return True


Reader = IteratorReader | ArrayReader
