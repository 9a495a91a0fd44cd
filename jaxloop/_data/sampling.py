"""Orders of an epoch in which examples come more or less often than once.

    sampling = balanced(labels, num_examples)
    sampling.order(np.random.default_rng([seed, epoch]))        # int64 indices, (num_examples,)

Invariant: an order is a function of the generator alone, and has as many indices as there are
examples.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Protocol

import jax
import numpy as np

from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentError, ArgumentTypeError, unknown_name

Indices = np.ndarray[Any, Any]


class Sampling(Protocol):
    """How the examples of an epoch are drawn."""

    @property
    def description(self) -> str:
        """What determines the orders, for a saved position."""

    def order(self, rng: np.random.Generator) -> Indices:
        """Draws the order of an epoch."""


def sampling_of(arrays: PyTree, num_examples: int, balance: Any, weights: Any) -> Sampling | None:
    """Returns the sampling that the arguments of `batches` ask for, or None.

    Raises:
        ArgumentError: Both are given, or one of them is unsuitable.
        ArgumentTypeError: Labels or weights are of a wrong type.
        UnknownNameError: The data have no part of the name ``balance``.
    """
    if balance is not None and weights is not None:
        raise ArgumentError(
            "batches: balance and sampling_weights cannot both be given",
            fix="pass only one of them",
        )
    if weights is not None:
        return weighted(weights, num_examples)
    if isinstance(balance, str):
        if not isinstance(arrays, dict) or balance not in arrays:
            raise unknown_name(
                "part of the data for balance=", balance, arrays if isinstance(arrays, dict) else ()
            )
        balance = arrays[balance]
    return None if balance is None else balanced(balance, num_examples)


@dataclasses.dataclass(frozen=True, eq=False)
class Balanced:
    """Each class equally often.

    Attributes:
        classes: The indices of the examples of each class.
        description: See `Sampling`.
    """

    classes: list[Indices]
    description: str

    def order(self, rng: np.random.Generator) -> Indices:
        """See `Sampling`."""
        size, more = divmod(sum(map(len, self.classes)), len(self.classes))
        counts = np.full(len(self.classes), size)
        counts[rng.permutation(len(self.classes))[:more]] += 1
        drawn = []
        for members, count in zip(self.classes, counts, strict=True):
            # Every example of a class comes before one of them comes again.
            rounds, rest = divmod(int(count), len(members))
            drawn += [np.tile(members, rounds), rng.permutation(members)[:rest]]
        return rng.permutation(np.concatenate(drawn))


def balanced(labels: Any, num_examples: int) -> Balanced:
    """Returns the sampling that draws each class equally often.

    Args:
        labels: The class of each example: integers, booleans or strings of shape
            ``(num_examples,)``.
        num_examples: The number of examples.
    """
    array = _as_array("balance", labels)
    if array.dtype == object:
        array = np.array(array.tolist())  # a column of strings
    if array.shape != (num_examples,):
        raise ArgumentError(
            f"batches: balance must be one label for each of the {num_examples} examples, got "
            f"shape {array.shape}",
            fix="pass labels of shape (num_examples,); for one-hot labels, labels.argmax(-1)",
        )
    if array.dtype.kind not in "biuSU":
        raise ArgumentTypeError(
            f"batches: balance must be labels that are integers, booleans or strings, got "
            f"{array.dtype}",
            fix="pass the number of each example's class",
        )
    _, which, counts = np.unique(array, return_inverse=True, return_counts=True)
    by_class = np.argsort(which, kind="stable")
    classes = np.split(by_class, np.cumsum(counts)[:-1]) if num_examples else []
    return Balanced(classes, f"balanced over {len(counts)} classes {_digest(which)}")


@dataclasses.dataclass(frozen=True, eq=False)
class Weighted:
    """Independent draws, each example with a probability in proportion to its weight.

    Attributes:
        bounds: The cumulative weights.
        description: See `Sampling`.
    """

    bounds: Indices
    description: str

    def order(self, rng: np.random.Generator) -> Indices:
        """See `Sampling`."""
        places = rng.random(len(self.bounds)) * self.bounds[-1]
        # "right" passes over examples of weight 0. A product may round up to the last bound.
        found = np.searchsorted(self.bounds, places, side="right")
        return np.minimum(found, np.searchsorted(self.bounds, self.bounds[-1]))


def weighted(weights: Any, num_examples: int) -> Weighted:
    """Returns the sampling that draws examples by weight.

    Args:
        weights: Real numbers of shape ``(num_examples,)``, at least 0 and not all 0.
        num_examples: The number of examples.
    """
    array = _as_array("sampling_weights", weights)
    real = jax.dtypes.issubdtype(array.dtype, np.number) and array.dtype.kind != "c"
    if not (real or array.dtype == bool):
        raise ArgumentTypeError(
            f"batches: sampling_weights must be real numbers, got {array.dtype}",
            fix="pass one weight for each example",
        )
    array = array.astype(np.float64)
    if array.shape != (num_examples,):
        raise ArgumentError(
            f"batches: sampling_weights must be one for each of the {num_examples} examples, got "
            f"shape {array.shape}",
            fix="pass weights of shape (num_examples,)",
        )
    wrong = array[~(np.isfinite(array) & (array >= 0))]
    if wrong.size or (num_examples and not array.any()):
        found = f"{wrong[0]}" if wrong.size else "only zeros"
        raise ArgumentError(
            f"batches: sampling_weights must be finite, at least 0 and not all 0, got {found}",
            fix="pass 0 for an example that is never drawn",
        )
    scaled = array / array.max() if num_examples else array  # the sum cannot overflow
    return Weighted(np.cumsum(scaled), f"by weights {_digest(array)}")


def _as_array(name: str, values: Any) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(values)
    except ValueError as error:  # of lists of different lengths
        raise ArgumentError(
            f"batches: {name} must be an array, got {values!r:.80}",
            fix="pass one number for each example",
        ) from error


def _digest(array: Indices) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]
