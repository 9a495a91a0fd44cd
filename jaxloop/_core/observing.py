"""What an observer that is opened for each run may do besides seeing snapshots.

    class Rows:
        def __call__(self, snapshot): ...
        def sync(self): ...                 # see `SyncedObserver`
        def close(self): ...                # see `ClosedObserver`

A run calls the methods that the observer has.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class SyncedObserver(Protocol):
    """An observer that keeps what it sees, and can make it durable."""

    def sync(self) -> None:
        """Makes everything durable that it has seen.

        A run calls this before it saves a state, after the observer has seen the firing that saves.
        So a run that resumes from this state has lost nothing.
        """


@runtime_checkable
class FailingObserver(Protocol):
    """An observer that wants to know of the error that ends a run."""

    def fail(self, error: BaseException) -> None:
        """Called with the error, before the observer is closed."""


@runtime_checkable
class ClosedObserver(Protocol):
    """An observer that has something to close."""

    def close(self) -> None:
        """Called once when the run ends, with or without an error, after the last save."""
