"""Positions in the data, from which a run can resume reading.

    own = stateful(iterator)                # Grain's iterators, torchdata's loaders, or None
    saved = own.get()
    own.set(saved)

If the data have their own state, it restores them. A saved position covers only batches that were
consumed. Batches that were only read ahead count as unread.
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
    """Returns how to get and set the state of an iterator or a loader, or None if it has none.

    Example:
        >>> stateful([1, 2]) is None
        True
    """
    if callable(getattr(data, "set_epoch", None)):
        # Its epoch is set from outside, so its state is not enough. After a Hugging Face data set
        # loads a state, every later epoch starts there too. The reader skips batches instead.
        return None
    for getter, setter in _PROTOCOLS:
        get, put = getattr(data, getter, None), getattr(data, setter, None)
        if callable(get) and callable(put):
            return Stateful(_copying(get), put)
    return None


def _copying(get: Callable[[], Any]) -> Callable[[], Any]:
    # Some loaders return a dict that they later change in place.
    return lambda: copy.deepcopy(get())


@dataclasses.dataclass(frozen=True, eq=False)
class Unread:
    """Batches read from a one-shot iterator but not consumed. They exist in this process only.

    Attributes:
        source: The iterator.
        batches: Returns the batches; it may wait for one that is being read.
    """

    source: Any
    batches: Callable[[], list[Batch]]


@dataclasses.dataclass(frozen=True, eq=False)
class Position:
    """The position of a run in its data.

    Attributes:
        one_shot: Whether the data are a one-shot iterator.
        state: The data's own state, or None. The next batch is ``skip`` batches after it.
        skip: See ``state``.
        at_end: Whether the state was taken at the end of the data.
        settings: The settings that determine the batches of `Batches`.
        unread: The unconsumed batches of a one-shot iterator.
    """

    one_shot: bool = False
    state: Any = None
    skip: int = 0
    at_end: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unread: Unread | None = None


FROM_COUNTERS = Position()
"""The position in data for which the run's own counters are enough."""

_SETTINGS = ("num_examples", "batch_size", "shuffle", "seed", "drop_remainder", "pad")


def position_of(data: Batches) -> Position:
    """Returns the position in `Batches`: the settings that determine each batch."""
    return Position(settings={name: getattr(data, name) for name in _SETTINGS})


def check_settings(position: Position, data: Batches, epoch: int) -> None:
    """Raises if ``data`` would give different batches for the rest of an epoch.

    Raises:
        DataError: A setting differs. The error names it.
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
