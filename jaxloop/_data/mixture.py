"""Mixtures of several data sets, batch by batch.

    data = mixture([batches(web, 32, shuffle=True), batches(books, 32)], weights=[3, 1])
    iterator = iter(data.epoch(2))
    iterator.set_state({"index": 17, "mixture": data.description})

Invariant: which batch comes at an index of an epoch is a function of the seed, the epoch and the
index, so a position is one integer besides the epoch. No data set skips a batch: each continues in
an epoch of the mixture where it was at the end of the one before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from jaxloop._core.batch import Signature, as_batch, describe_leaves
from jaxloop._core.checks import check_count, in_words
from jaxloop._core.types import PyTree
from jaxloop._data.in_memory import Batches
from jaxloop.errors import ArgumentError, ArgumentTypeError, DataError

MixtureState: TypeAlias = dict[str, Any]
"""The position in an epoch of a mixture: ``index``, and a description of the mixture."""

_END: Final = object()


def mixture(
    data: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    num_batches: int | None = None,
    seed: int = 0,
) -> Mixture:
    """Mixes several data sets. Each batch of the mixture is a batch of one of them.

    An epoch has ``num_batches`` batches, of which each data set has a fixed number: its share by
    weight, rounded. Their order is new in each epoch, a function of ``(seed, epoch)``. A data set
    that ends begins its own next epoch, and one that does not end continues in the next epoch of
    the mixture. To mix examples within a batch, join the arrays and pass ``sampling_weights`` to
    `batches`.

    Args:
        data: The data sets: `batches`, mixtures, or sequences of batches, with a length and an
            index, such as a list or a batched Grain ``MapDataset``. Their batches must agree in
            structure, dtypes and shapes, except for the number of examples.
        weights: The share of each data set in the batches, finite and above 0. By default, an
            epoch has each batch of each data set once.
        num_batches: The number of batches in an epoch. By default, as many as the data sets have
            together.
        seed: The seed of the orders.

    Returns:
        A re-iterable with a length, for `Loop.run`. Plain iteration gives epoch 0. A run resumes
        in the middle of an epoch without reading the batches before.

    Raises:
        ArgumentError: There are no data sets, one is empty, the weights are unsuitable, or a data
            set would have no batch in an epoch.
        ArgumentTypeError: A data set has no length or index.
        DataError: The batches of two data sets do not agree.

    Example:
        >>> data = mixture([[1, 2, 3], [10]], weights=[3, 1], num_batches=8)
        >>> list(data)
        [1, 2, 3, 10, 1, 2, 3, 10]
    """
    check_count("seed", seed, at_least=0, where="mixture")
    parts = _checked_parts(data)
    lengths = [len(part) for part in parts]
    if num_batches is not None:
        check_count("num_batches", num_batches, at_least=1, where="mixture")
    total = sum(lengths) if num_batches is None else int(num_batches)
    shares = _checked_weights(weights, len(parts))
    counts = _apportioned(np.asarray(lengths, float) if shares is None else shares, total)
    return Mixture(parts, counts, int(seed), _common_signature(parts))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Mixture:
    """A re-iterable over batches of several data sets; made by `mixture`.

    Attributes:
        parts: The data sets.
        counts: The number of batches of each in an epoch.
        seed: The seed of the orders.
        signature: The signature of the first batch of the first data set.
    """

    parts: tuple[Any, ...]
    counts: tuple[int, ...]
    seed: int
    signature: Signature

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[PyTree]:
        return iter(self.epoch(0))

    def __repr__(self) -> str:
        shares = ", ".join(f"{n} of {part!r:.60}" for n, part in self._shares)
        return f"mixture({shares})"

    @property
    def _shares(self) -> list[tuple[int, Any]]:
        return list(zip(self.counts, self.parts, strict=True))

    @property
    def pad(self) -> bool:
        """Whether a batch may have padding."""
        return any(isinstance(part, Batches | Mixture) and part.pad for part in self.parts)

    @functools.cached_property
    def description(self) -> str:
        """What determines the batches, apart from the values of the arrays."""
        parts = [f"{n} of {_described(part)}" for n, part in self._shares]
        return f"mixture with seed {self.seed}: {'; '.join(parts)}"

    def order(self, epoch: int) -> np.ndarray[Any, Any]:
        """Returns the number of the data set of each batch in an epoch."""
        drawn = np.repeat(np.arange(len(self.parts)), self.counts)
        return np.random.default_rng([self.seed, epoch]).permutation(drawn)

    def epoch(self, epoch: int) -> MixtureEpoch:
        """Returns the batches of one epoch."""
        return MixtureEpoch(self, epoch)


@dataclasses.dataclass(frozen=True, eq=False)
class MixtureEpoch:
    """The batches of one epoch of a mixture, a re-iterable with a length."""

    mixture: Mixture
    number: int

    def __len__(self) -> int:
        return len(self.mixture)

    def __iter__(self) -> MixtureIterator:
        return MixtureIterator(self.mixture, self.number)


class MixtureIterator:
    """A position in an epoch of a mixture.

    Args:
        mixture: The mixture.
        epoch: The epoch.
    """

    def __init__(self, mixture: Mixture, epoch: int) -> None:
        self._mixture, self._epoch = mixture, epoch
        self._order = mixture.order(epoch)
        self._cursors = [_Cursor(part) for part in mixture.parts]
        self._seek(0)

    def _seek(self, index: int) -> None:
        counts = np.asarray(self._mixture.counts)
        before = np.bincount(self._order[:index], minlength=len(counts))
        self._taken = [int(n) for n in self._epoch * counts + before]
        self._index = index

    def __iter__(self) -> MixtureIterator:
        return self

    def __next__(self) -> PyTree:
        if self._index >= len(self._order):
            raise StopIteration
        part = int(self._order[self._index])
        batch = self._cursors[part].at(self._taken[part])
        self._taken[part] += 1
        self._index += 1
        return batch

    def get_state(self) -> MixtureState:
        """Returns the position."""
        return {"index": self._index, "mixture": self._mixture.description}

    def set_state(self, state: MixtureState) -> None:
        """Goes to a position.

        Raises:
            DataError: It is one in another mixture.
        """
        mine = self._mixture.description
        if state["mixture"] != mine:
            raise DataError(
                "the state to resume from is in the middle of an epoch of another mixture; it was "
                f"{state['mixture']} and is {mine}",
                fix="finish the epoch with the same data and settings, and change them after it",
            )
        self._seek(int(state["index"]))


class _Cursor:
    """Gives the batches of one data set by their number, counted over all of its epochs."""

    def __init__(self, part: Any) -> None:
        self._part, self._length = part, len(part)
        self._known = -1
        self._order: Any = None
        self._iterator: MixtureIterator | None = None

    def at(self, number: int) -> PyTree:
        """Returns a batch."""
        part = self._part
        epoch, index = divmod(number, self._length)
        if isinstance(part, Batches):
            if self._known != epoch:
                self._known, self._order = epoch, part.order(epoch)
            return part.batch(self._order, index)
        if not isinstance(part, Mixture):
            return part[index]
        if self._known != number or self._iterator is None or not index:
            self._iterator = iter(part.epoch(epoch))
            self._iterator.set_state({"index": index, "mixture": part.description})
        self._known = number + 1
        return next(self._iterator)


def _checked_parts(data: Any) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple) or not data:
        raise ArgumentError(
            f"mixture: data must be a list of data sets, got {in_words(data)}",
            fix="pass a list such as [jl.batches(a, 32), jl.batches(b, 32)]",
        )
    for index, part in enumerate(data):
        known = isinstance(part, Batches | Mixture)
        sequence = hasattr(part, "__len__") and hasattr(part, "__getitem__")
        if not known and (not sequence or isinstance(part, str | bytes | dict)):
            raise ArgumentTypeError(
                "mixture: a data set must have a length and an index, got a "
                f"{type(part).__name__} at {index}",
                fix="pass jl.batches, a mixture or a list of batches; mix others with the tools of "
                "their library, such as grain.MapDataset.mix, and pass the result to run",
            )
        if not len(part):
            raise ArgumentError(
                f"mixture: a data set must have at least one batch, got an empty one at {index}",
                fix="leave it out",
            )
    return tuple(data)


def _checked_weights(weights: Any, num_parts: int) -> np.ndarray[Any, Any] | None:
    if weights is None:
        return None
    try:
        array = np.asarray(weights, np.float64)
    except (TypeError, ValueError):
        array = np.full(num_parts, np.nan)
    if array.shape != (num_parts,) or not (np.isfinite(array) & (array > 0)).all():
        raise ArgumentError(
            f"mixture: weights must be {num_parts} finite numbers above 0, one for each data set, "
            f"got {weights!r:.80}",
            fix="pass one number for each data set, and leave out one that is not wanted",
        )
    return array / array.max()


def _apportioned(shares: np.ndarray[Any, Any], total: int) -> tuple[int, ...]:
    """Returns whole numbers in proportion to shares, by the method of the largest remainder."""
    exact = shares / shares.sum() * total
    counts = np.floor(exact).astype(int)
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[: total - counts.sum()]] += 1
    if not counts.all():
        raise ArgumentError(
            f"mixture: each data set must have a batch in an epoch of {total} batches, got none "
            f"for that at {int(np.argmin(counts))}",
            fix="pass a larger num_batches or a larger weight",
        )
    return tuple(int(n) for n in counts)


def _common_signature(parts: tuple[Any, ...]) -> Signature:
    first, *others = [
        part.signature
        if isinstance(part, Batches | Mixture)
        else as_batch(part[0], f"mixture: batch 0 of the data set at {index}").signature
        for index, part in enumerate(parts)
    ]
    for index, other in enumerate(others, 1):
        if _of_example(other) != _of_example(first):
            raise DataError(
                "mixture: the batches of all data sets must agree except for the number of "
                f"examples, got {describe_leaves(*first)} at 0 and {describe_leaves(*other)} at "
                f"{index}",
                fix="give them the same structure, dtypes and shapes, and pad all or none",
            )
    return first


def _of_example(signature: Signature) -> Any:
    return signature.tree, tuple((shape[1:], dtype) for shape, dtype in signature.leaves)


def _described(part: Any) -> str:
    if isinstance(part, Batches):
        return f"jl.batches {part.settings}"
    if isinstance(part, Mixture):
        return part.description
    return f"{len(part)} batches"
