"""Positions in data: what a run needs to resume reading where it was.

    own = stateful(iterator)                # Grain's iterators, torchdata's loaders, or None
    saved = own.get()
    own.set(saved)

If data have a state, that state restores them. What is saved belongs to the batches that were
consumed: batches that were only read ahead count as unread.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxloop._core.batch import Batch
from jaxloop._data.in_memory import Batches
from jaxloop.errors import DataError

_PROTOCOLS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))


class Stateful(NamedTuple):
    """How to get and set the state of an iterator or a loader."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]


def stateful(data: object) -> Stateful | None:
    """Returns the state of an iterator or a loader, if it has one.

    Example:
        >>> stateful([1, 2]) is None
        True
    """
    if callable(getattr(data, "set_epoch", None)):
        # Its epoch is set from outside, and its state is not enough: after a data set of Hugging
        # Face's has loaded a state, every later epoch starts there too. It is read past instead.
        return None
    for getter, setter in _PROTOCOLS:
        get, put = getattr(data, getter, None), getattr(data, setter, None)
        if callable(get) and callable(put):
            return Stateful(_copying(get), put)
    return None


def _copying(get: Callable[[], Any]) -> Callable[[], Any]:
    # Some loaders return the very dict that they keep changing.
    return lambda: copy.deepcopy(get())


@dataclasses.dataclass(frozen=True, eq=False)
class Unread:
    """What was read from a one-shot iterator and not consumed. It exists in this process only.

    Attributes:
        source: The iterator.
        batches: Returns the batches; it may wait for one that is being read.
    """

    source: Any
    batches: Callable[[], list[Batch]]


@dataclasses.dataclass(frozen=True, eq=False)
class Position:
    """Where a run was in its data.

    Attributes:
        one_shot: Whether they were a one-shot iterator.
        state: The data's own state, or None. The next batch is ``skip`` batches after it.
        skip: See ``state``.
        at_end: Whether the state is that of data that were read to their end.
        settings: What decides about the batches of `Batches`.
        unread: What was read ahead from a one-shot iterator.
    """

    one_shot: bool = False
    state: Any = None
    skip: int = 0
    at_end: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unread: Unread | None = None


FROM_COUNTERS = Position()
"""The position of data that needs nothing but the run's own counters."""

_SETTINGS = ("num_examples", "batch_size", "shuffle", "seed", "drop_remainder", "pad")


def position_of(data: Batches) -> Position:
    """Returns the position in `Batches`: what decides which examples are in which batch."""
    return Position(settings={name: getattr(data, name) for name in _SETTINGS})


def check_settings(position: Position, data: Batches, epoch: int) -> None:
    """Raises if ``data`` would give other batches for the rest of an epoch.

    Raises:
        DataError: They would; the error says what differs.
    """
    if not position.settings:
        return
    differ = [
        f"{name} was {position.settings.get(name)!r} and is {value!r}"
        for name, value in position_of(data).settings.items()
        if position.settings.get(name) != value
    ]
    if differ:
        raise DataError(
            f"the state to resume from is in the middle of epoch {epoch}, and these data give "
            f"different batches: {', '.join(differ)}",
            fix="resume with the same jl.batches(...), or from a state at the end of an epoch",
        )
