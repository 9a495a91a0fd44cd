"""The user's data, of any kind, and the reader that reads them.

    source = DataSource(data, Bounds(2, None, None), interrupts)
    max_iteration = source.open(epoch=0, skip=0)
    sample = source.reader.sample()

A source knows the kind of its data and can open them at the position of an earlier run. It does not
read ahead. The `Prefetcher` does that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jaxloop._core.batch import Batch, Signature
from jaxloop._core.bounds import Bounds, limited
from jaxloop._core.interrupts import Interrupts
from jaxloop._data.array_reader import ArrayReader, EpochArrays
from jaxloop._data.in_memory import Batches
from jaxloop._data.iterator_reader import IteratorReader
from jaxloop._data.mixture import Mixture
from jaxloop._data.position import (
    FROM_COUNTERS,
    NO_DATA,
    Position,
    check_settings,
    stateful,
)
from jaxloop._data.readers import Reader
from jaxloop.errors import ArgumentError, ArgumentTypeError, DataError

KEEPS_POSITION = (
    "use data whose position can be saved: a re-iterable (a list, jl.batches), a function epoch -> "
    "iterable, or an iterator with get_state and set_state (such as Grain's)"
)

_SAMPLE = Bounds(1, 1, None)
"""The bounds of a sample. Data of every kind may have them."""

NO_BATCH = Batch(None, Signature(None, ()))
"""The batch of a step that needs no data."""


class DataSource:
    """The user's data.

    Args:
        data: The data that were passed to `run`.
        bounds: How far the run goes.
        interrupts: The signals, which may interrupt a wait for slow data.

    Attributes:
        iterable: What is iterated over in the current epoch: the data, or what a function returned.
        one_shot: Whether the data are an iterator, which continues across epochs.
        reader: The reader of the current epoch.

    Raises:
        ArgumentError: The data need a bound that is missing.
        ArgumentTypeError: ``data`` is not iterable.
    """

    def __init__(self, data: Any, bounds: Bounds, interrupts: Interrupts) -> None:
        self.data, self.bounds = data, bounds
        self.interrupts = interrupts
        self.iterable = data
        self._epoch_arrays = EpochArrays(bounds.iterations)
        self.one_shot = data is not None and hasattr(data, "__next__")
        self._check()
        self.reader: Reader = IteratorReader(iter(()), 0, False)
        if self.one_shot:
            self.reader = self._one_shot_reader()

    def _check(self) -> None:
        data, bounds = self.data, self.bounds
        if data is None:
            if bounds.iterations is None and bounds.steps is None:
                raise ArgumentError(
                    "run: data=None needs iterations=, the number of steps in an epoch, or steps=",
                    fix="pass data, or a number such as iterations=100",
                )
        elif self.one_shot:
            if (bounds.epochs or 0) > 1 and bounds.iterations is None:
                raise ArgumentError(
                    "run: several epochs of a one-shot iterator need iterations=, because the "
                    "iterator cannot say where an epoch ends",
                    fix="pass iterations=, or a re-iterable, or a function epoch -> iterable",
                )
        elif isinstance(data, str | bytes) or not (hasattr(data, "__iter__") or callable(data)):
            raise ArgumentTypeError(
                "run: data must be an iterable of batches, a function epoch -> iterable, or None, "
                f"got {type(data).__name__}",
                fix="pass batches; for arrays in memory, use jl.batches((x, y), batch_size)",
            )

    @property
    def keeps_position(self) -> bool:
        """Whether another process could resume from the position of this one."""
        return not self.one_shot or stateful(self.data) is not None

    def sample(self) -> Batch | None:
        """Returns the next batch without consuming it, or None at the end of the data."""
        if self.data is None:
            return NO_BATCH
        with self.interrupts.waiting:
            return self.reader.sample()

    def sample_shapes(self) -> Batch | None:
        """Returns the next batch like `sample`, with shapes in place of arrays that are not read.

        The signature of `Batches` is known, so none of their batches is gathered.
        """
        reader = self.reader
        if isinstance(reader, ArrayReader) and reader.num_read < reader.batches.num_full:
            return reader.batches.shapes
        return self.sample()

    def open(self, epoch: int, skip: int, position: Position = FROM_COUNTERS) -> None:
        """Opens an epoch after ``skip`` batches that were consumed in an earlier run.

        Raises:
            DataError: The data cannot be restored to the position of the earlier run.
        """
        if self.one_shot:
            self._open_one_shot(epoch, skip, position)
        elif self.data is None:
            if skip:
                check_settings(position, NO_DATA.settings, epoch)
        else:
            with self.interrupts.waiting:
                self.reader = self._reader_at(epoch, skip, position)

    def length(self, limit: int | None) -> int | None:
        """Returns the number of iterations of the current epoch, or None if it is unknown.

        Args:
            limit: How many it may have.
        """
        length = None if self.data is None else self.reader.length
        if length is not None:
            return limited(length, limit)
        ends_there = self.bounds.iterations is not None or self.data is None or self.one_shot
        return limit if ends_there else None

    def following(self, epoch: int, step: int) -> ArrayReader | None:
        """Returns a reader of the next epoch, if the run has one and its order is already known.

        Args:
            epoch: The next epoch.
            step: The number of steps before it.
        """
        # The order of `Batches` is a function of (seed, epoch).
        if isinstance(self.data, Batches) and self.bounds.has_epoch(epoch, step):
            return ArrayReader(self.data, epoch, 0, self._epoch_arrays)
        return None

    def release(self) -> None:
        """Drops the arrays that the run made on the device. Its position stays."""
        self._epoch_arrays.release()

    def _reader_at(self, epoch: int, skip: int, position: Position) -> Reader:
        data = self.data
        if not isinstance(data, Batches) and not hasattr(data, "__iter__"):
            data = data(epoch)
        self.iterable = data
        if isinstance(data, Mixture):
            data = data.epoch(epoch)
        if isinstance(data, Batches):
            if skip:
                check_settings(position, data.settings, epoch)
            return ArrayReader(data, epoch, skip, self._epoch_arrays)
        loader = None if hasattr(data, "__next__") else stateful(data)
        known = position.state is not None
        again = skip
        if loader is not None and known:
            # The state of a loader is set before iterating over it, that of an iterator after.
            loader.set(position.state)
            again = position.skip
            if not skip and not position.at_end:
                # The last epoch was started but not read to its end.
                IteratorReader(iter(data), epoch, one_shot=False).skip(again, self.interrupts.poll)
                again = 0
        iterator = iter(data)
        own = loader or stateful(iterator)
        restores = own is not None and loader is None and known and skip > 0
        first_batch = position.settings.get("first_batch") if loader is not None else None
        if restores:
            assert own is not None
            first_batch = self._first_batch(iterator, epoch)
            own.set(position.state)
            again = position.skip
        reader = IteratorReader(iterator, epoch, one_shot=False, own=own, num_read=skip - again)
        with contextlib.suppress(TypeError):  # data without a length, or of an unknown length
            reader.length = len(data)
        reader.first_batch = first_batch
        if skip and not reader.num_read:
            reader.skip(1, self.interrupts.poll)  # the epoch's first batch
            again -= 1
        if skip:
            check_settings(position, reader.settings, epoch)
        reader.skip(again, self.interrupts.poll)
        return reader

    @staticmethod
    def _first_batch(iterator: Iterator[Any], epoch: int) -> str | None:
        """Reads the first batch of an epoch, for its shapes."""
        reader = IteratorReader(iterator, epoch, one_shot=False)
        reader.sample()
        return reader.first_batch

    # --- one-shot iterators --------------------------------------------------------------------

    def _one_shot_reader(self) -> IteratorReader:
        return IteratorReader(self.data, 0, one_shot=True, own=stateful(self.data))

    def _open_one_shot(self, epoch: int, skip: int, position: Position) -> None:
        own = stateful(self.data)
        assert isinstance(self.reader, IteratorReader)
        if skip:
            check_settings(position, self.reader.settings, epoch)
        if own is not None and position.state is not None:
            own.set(position.state)
            self.reader = reader = self._one_shot_reader()
            reader.skip(position.skip, self.interrupts.poll)
        elif position.unread is not None:
            if position.unread.source is self.data:
                self.give_back(position.unread.batches())
        elif position.one_shot or skip:
            raise DataError(
                "the state to resume from belongs to a one-shot iterator, whose position is known "
                f"only in the process that read it; {skip} batches of this epoch were consumed",
                fix=KEEPS_POSITION,
            )

    def give_back(self, batches: list[Batch]) -> None:
        """Gives back batches that were read from a one-shot iterator but not consumed."""
        assert isinstance(self.reader, IteratorReader)
        self.reader.held.clear()
        self.reader.held.extend(batches)


def sample_of(data: Any) -> Batch:
    """Returns the first batch of data, without consuming it.

    Raises:
        DataError: The data are empty, or a one-shot iterator whose position cannot be set.
        ArgumentTypeError: ``data`` is not iterable.
    """
    source = DataSource(data, _SAMPLE, Interrupts())
    own = stateful(data) if source.one_shot else None
    if source.one_shot and own is None:
        raise DataError(
            "data must be re-iterable, got a one-shot iterator, which would lose a batch",
            fix="pass a list of one batch, such as data=[batch]",
        )
    before = None if own is None else own.get()
    source.open(0, 0)
    sample = source.sample()
    if own is not None:
        own.set(before)
    if sample is None:
        raise no_batch("data")
    return sample


def no_batch(what: str) -> DataError:
    """Returns the error for data without a batch."""
    return DataError(
        f"{what} must have at least one batch, got empty data", fix="pass at least one batch"
    )
