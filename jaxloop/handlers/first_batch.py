"""The first batch of data that other code will iterate over again.

    with same_random_numbers():
        batch, data = first_batch(data)         # `data` begins with this batch again

Nothing is lost and nothing is drawn twice: what remains to be read includes the first batch.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from jaxloop._core.types import PyTree
from jaxloop._data.in_memory import Batches
from jaxloop.errors import ArgumentTypeError

END: Final = object()
"""The first batch of empty data."""


class _Continued:
    """An iterator as an iterable, with the first item that was read from it."""

    def __init__(self, first: PyTree, iterator: Iterator[PyTree]) -> None:
        self._items = itertools.chain([first], iterator)

    def __iter__(self) -> Iterator[PyTree]:
        return self._items


def first_batch(data: Any) -> tuple[PyTree, Any]:
    """Returns the first batch of the data, or `END`, and the data from that batch on."""
    if isinstance(data, Batches):
        return next(data.epoch(0), END), data
    if isinstance(data, list | tuple):
        return data[0] if data else END, data
    if isinstance(data, str | bytes) or not hasattr(data, "__iter__"):
        raise ArgumentTypeError(
            "the function epoch -> iterable must return an iterable of batches, got "
            f"{type(data).__name__}",
            fix="return batches, such as jl.batches((x, y), batch_size)",
        )
    iterator = iter(data)
    first = next(iterator, END)
    return first, _Continued(first, iterator)


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Restores the global random generators, which many data loaders draw from when opened."""
    python, numpy, torch = random.getstate(), np.random.get_state(), sys.modules.get("torch")
    of_torch = None if torch is None else torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch is not None:
            torch.set_rng_state(of_torch)
