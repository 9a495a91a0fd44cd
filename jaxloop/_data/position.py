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
        settings: What is known of the data that determines the batches. It holds the ``kind`` of
            the data, for `Batches` the settings, and for others the ``length`` and the shapes of
            the ``first_batch``.
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

NO_DATA = Position(settings={"kind": "data=None"})
"""The position of a run whose steps need no data."""


def check_settings(position: Position, settings: Mapping[str, Any], epoch: int) -> None:
    """Raises if the data would give different batches for the rest of an epoch.

    Args:
        position: The position of the earlier run. Settings that it lacks are not compared.
        settings: The settings of the present data.
        epoch: The epoch.

    Raises:
        DataError: A setting differs. The error names it.
    """
    saved = dict(position.settings)
    if "batch_size" in saved:
        saved.setdefault("kind", "jl.batches")  # earlier versions did not save the kind
    same_kind = saved.get("kind") == settings.get("kind")
    names = saved if same_kind or "kind" not in saved else ("kind",)
    differ = [
        f"{name} was {saved[name]!r} and is {settings.get(name)!r}"
        for name in names
        if saved[name] is not None and saved[name] != settings.get(name)
    ]
    if differ:
        raise DataError(
            f"the state to resume from is in the middle of epoch {epoch}, and these data give "
            f"different batches: {', '.join(differ)}",
            fix="finish the epoch with the same data and settings, and change them after it, or "
            "continue from a checkpoint at the end of an epoch",
        )
