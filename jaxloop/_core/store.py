"""The protocol of a place where a run saves its states.

    store.save(state, value)
    store.begin()                           # once the engine has copied the arrays
    store.close()

A checkpoint trigger opens a store once per run.
"""

from __future__ import annotations

from typing import Any, Protocol

from jaxloop._core.state import State


class Store(Protocol):
    """A place where a run saves its states."""

    on_exception: bool
    """Whether the last good state is saved if an exception ends the run."""

    def save(self, state: State[Any], value: float | None) -> None:
        """Prepares to save ``state``.

        If ``value`` is not None, the state is the best so far by that value. As long as the store
        keeps a reference to the state, the engine copies the arrays before it donates them.
        """

    def begin(self) -> None:
        """Starts writing what `save` prepared. By then, the engine has copied the arrays."""

    def poll(self) -> None:
        """Raises if a background save has failed. Does not wait."""

    def newest(self, state: State[Any]) -> State[Any] | None:
        """Waits for the last save, and returns the newest good state of the run of ``state``.

        A state that is later than ``state`` does not count.
        """

    def newest_name(self) -> tuple[int, str] | None:
        """Waits for the last save, and returns the step and the name of the newest good state."""

    def newest_complete(self) -> str | None:
        """Returns the folder of the newest checkpoint that is complete. Does not wait."""

    def close(self) -> None:
        """Waits for the last save, raises if it failed, and stops the threads."""
