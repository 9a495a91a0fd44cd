"""The flags by which a model is told whether it trains.

    flags = TrainFlags.of(HAIKU_FLAGS, inspect.signature(fn))
    fn(x, **flags.values(train=True))

Invariant: a model gets only the flags that it declares.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

LINEN_FLAGS = {
    "train": True,
    "training": True,
    "deterministic": False,
    "use_running_average": False,
}
"""The flags that the ``__call__`` of a Linen module may declare, and their values in training."""

_NONE: Mapping[str, Any] = {}

HAIKU_FLAGS = {"is_training": True, **LINEN_FLAGS}
"""The flags that a function for Haiku may declare, and their values in training."""


@dataclasses.dataclass(frozen=True)
class TrainFlags:
    """The flags that one model declares.

    Attributes:
        in_training: Their values in training.
        positions: Their places among the arguments of a call.
    """

    in_training: Mapping[str, bool]
    positions: Mapping[str, int]

    @classmethod
    def of(cls, known: Mapping[str, bool], signature: inspect.Signature) -> TrainFlags:
        """Returns those of the known flags that are parameters of ``signature``.

        The first two parameters are never flags: they are ``self`` or a key, and the inputs.

        Example:
            >>> TrainFlags.of(HAIKU_FLAGS, inspect.signature(lambda rng, x, is_training: x))
            TrainFlags(in_training={'is_training': True}, positions={'is_training': 1})
        """
        declared = list(signature.parameters)[1:]
        flags = [name for name in known if name in declared[1:]]
        return cls(
            {name: known[name] for name in flags}, {name: declared.index(name) for name in flags}
        )

    def values(self, train: bool, num_passed: int = 1, named: Mapping[str, Any] = _NONE) -> Any:
        """Returns the keyword arguments for training or evaluation.

        Args:
            train: Whether the model trains.
            num_passed: How many arguments the caller passes by position. A flag among them wins.
            named: The keyword arguments that the caller passes. A flag among them wins.
        """
        return {
            name: value == train
            for name, value in self.in_training.items()
            if self.positions[name] >= num_passed and name not in named
        }
