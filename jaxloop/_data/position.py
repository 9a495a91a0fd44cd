"""Positions in data: what a run needs so as to go on reading where it was.

    own = stateful(iterator)                # Grain's iterators, torchdata's loaders, or None
    saved = own.get()
    own.set(saved)

Data with a state of their own are put back by it. What is saved belongs to the batches that were
consumed: those that were read ahead count as unread.
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


def stateful(thing: Any) -> Stateful | None:
    """The state of an iterator or a loader, if it has one.

    Example:
        >>> stateful([1, 2]) is None
        True
    """
    if callable(getattr(thing, "set_epoch", None)):
        # Its epoch is set from outside, and its state is not enough: one of Hugging Face's that has
        # loaded a state begins each epoch that follows there. It is read past, like any other.
        return None
    for getter, setter in _PROTOCOLS:
        get, put = getattr(thing, getter, None), getattr(thing, setter, None)
        if callable(get) and callable(put):
            # A copy, as some give the very dict that they go on changing.
            return Stateful(lambda get=get: copy.deepcopy(get()), put)  # type: ignore[misc]  # a lambda's default
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Unread:
    """What was read from a one-shot iterator and not consumed; it lives in this process alone.

    Attributes:
        source: The iterator.
        batches: Gives the batches; it may wait for one that is being read.
    """

    source: Any
    batches: Callable[[], list[Batch]]


@dataclasses.dataclass(frozen=True, eq=False)
class Position:
    """Where a run was in its data.

    Attributes:
        one_shot: Whether they were a one-shot iterator.
        state: Their own state, of which ``skip`` batches further the next one comes; None: none.
        skip: See ``state``.
        at_end: Whether the state is that of data that were read to their end.
        settings: What decides about the batches of `Batches`.
        unread: Of a one-shot iterator.
    """

    one_shot: bool = False
    state: Any = None
    skip: int = 0
    at_end: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unread: Unread | None = None


NOWHERE = Position()
"""Of data whose position is known from the counters alone."""


_SETTINGS = ("num_examples", "batch_size", "shuffle", "seed", "drop_remainder", "pad")


def settings_of(data: Batches) -> dict[str, Any]:
    """What decides which examples are in which batch."""
    return {name: getattr(data, name) for name in _SETTINGS}


def check_settings(position: Position, data: Any, epoch: int) -> None:
    """Raises if the batches of an epoch that is going on would be other ones.

    Raises:
        DataError: They would; the error says what differs.
    """
    if not position.settings or not isinstance(data, Batches):
        return
    differ = [
        f"{name} was {position.settings.get(name)!r} and is {value!r}"
        for name, value in settings_of(data).items()
        if position.settings.get(name) != value
    ]
    if differ:
        raise DataError(
            f"the state to go on from is in the middle of epoch {epoch}, and the batches of these "
            f"data are other ones: {', '.join(differ)}",
            fix="go on with the same jl.batches(...), or from a state at the end of an epoch",
        )
