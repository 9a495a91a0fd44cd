"""A loop as data, and what is attached to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxloop._core.events import Event
from jaxloop._core.filters import Filter
from jaxloop._core.state import State
from jaxloop._core.types import PyTree

if TYPE_CHECKING:
    from jaxloop._loop import Loop

EventLike = Event | str | list[Event | str] | tuple[Event | str, ...]


FilterLike = Filter | str | Mapping[str, Any] | Callable[[Any], bool]


Handler = Callable[[State], Any]


@runtime_checkable
class PreparedInit(Protocol):
    """An init function in three parts, of which only ``fn`` is compiled.

    A loop takes any ``init_fn(batch, init_state)``. If it has these three parts, the run calls them
    in this order: ``prepare``, ``fn``, ``check``.
    """

    @property
    def fn(self) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
        """``(batch, prepared) -> (step_state, evidence)``, a pure function."""

    def prepare(self, init_state: Any) -> PyTree:
        """Returns what the user passed to `run` as arrays that can go through `jax.jit`."""

    def check(self, evidence: PyTree) -> None:
        """Raises if the evidence, which ``fn`` computed from the first batch, shows a mistake."""


class Saves(Protocol):
    """What a run writes to while it goes on.

    Attributes:
        on_exception: Whether the last good state is saved when an exception ends the run.
    """

    on_exception: bool

    def save(self, state: State) -> None:
        """Makes ready to save a state; where it is kept, its arrays are to be copied."""

    def begin(self) -> None:
        """Begins to write it, once the driver has copied what it donates."""

    def poll(self) -> None:
        """Raises if a save in the background has failed; does not wait."""

    def newest(self, like: PyTree) -> State | None:
        """The newest good state, once it is there."""

    def close(self) -> None:
        """Waits for the last save, raises if it failed, and ends the threads."""


@dataclasses.dataclass(frozen=True)
class Attachment:
    """One handler, observer or saver, with the events and the filter that it was attached with.

    Attributes:
        kind: "handler", "observer", "saver": a handler that returns whether to save too, or
            "guard": one that says whether the state is good.
        watches: Metrics that must exist when it runs.
        adds: Metrics that it adds; None: whatever it likes.
        open: For a saver, opens what a run writes to.
        prepare: Called before the first step with the loop; raises what can be known then.
    """

    events: tuple[Event, ...]
    fn: Callable[..., Any]
    filter: Filter
    name: str
    kind: str = "handler"
    watches: tuple[str, ...] = ()
    adds: tuple[str, ...] | None = None
    open: Callable[[], Saves] | None = None
    prepare: Callable[[Loop], None] | None = None
    rewinds: bool = False
    """Of a guard: whether it asks to go back to the newest checkpoint, and not to halt."""
    reserved: bool = False
    """Whether the name keys a memory of its own, so that no other may have it."""
