"""Data of every kind, with and without a state of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxloop as jl


class Reiterable:
    """An iterable that is neither sized nor a list."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


KINDS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "reiterable": Reiterable,
    "function": lambda batches: lambda epoch: iter(batches),
    "generator": lambda batches: lambda epoch: (batch for batch in batches),
    "jax": lambda batches: [jnp.asarray(batch) for batch in batches],
    "batches": lambda batches: jl.batches(np.concatenate(batches), 2),
    "device": lambda batches: jl.batches(np.concatenate(batches), 2, device=True),
}


class Counted:
    """An iterator with a state of its own."""

    def __init__(self, num: int, epoch: int = 0) -> None:
        self._at, self._num, self._epoch = 0, num, epoch

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> Any:
        if self._at >= self._num:
            raise StopIteration
        self._at += 1
        return np.full(2, 10 * self._epoch + self._at, np.float32)

    def get_state(self) -> Any:
        return {"at": self._at}

    def set_state(self, state: Any) -> None:
        self._at = state["at"]


class Loader:
    """A loader with a state over epochs, as those of torchdata."""

    def __init__(self) -> None:
        self._epoch, self._at, self._resumed = 0, 0, False

    def state_dict(self) -> Any:
        return {"epoch": self._epoch, "at": self._at}

    def load_state_dict(self, state: Any) -> None:
        self._epoch, self._at, self._resumed = state["epoch"], state["at"], True

    def __iter__(self) -> Iterator[Any]:
        if not self._resumed:
            self._at = 0
        self._resumed = False
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        order = np.random.default_rng(self._epoch).permutation(7)
        while self._at < 7:
            self._at += 1
            yield np.full(2, order[self._at - 1], np.float32)
        self._epoch, self._at = self._epoch + 1, 0


NUMBERS = np.arange(28, dtype=np.float32)
RESUMED: dict[str, Callable[[], Any]] = {
    "batches": lambda: jl.batches(NUMBERS, 4, shuffle=True),
    "device": lambda: jl.batches(NUMBERS, 4, shuffle=True, device=True),
    "reiterable": lambda: Reiterable([np.full(2, i, np.float32) for i in range(7)]),
    "function": lambda: (
        lambda epoch: Reiterable([np.full(2, i * epoch, np.float32) for i in range(7)])
    ),
    "own state": lambda: lambda epoch: Counted(5 + epoch, epoch),
    "iterator": lambda: Counted(100),
    "loader": Loader,
    "ragged": lambda: [np.ones(4, np.float32), np.full(4, 2.0, np.float32), np.ones(3, np.float32)],
}
