"""An attachment in one run: the kind of its filter, and when it last ran.

    attached = [Attached(one) for one in spec.acting()]
    if one.admits(total, epoch, clock.began_s): ...

A function filter needs a state, so it is evaluated when the attachment's turn comes. Every other
filter depends only on counts and the clock. Each filter is evaluated once per firing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from jaxloop._core.filters import Firing
from jaxloop._engine.clock import now
from jaxloop._spec import Attachment, CheckpointTrigger, Handler

A = TypeVar("A", bound=Attachment)


class Attached(Generic[A]):
    """An attachment in one run.

    Attributes:
        attachment: The attachment.
        asks: Whether a user's function decides when it runs.
        timed: Whether the decision depends on a clock.
        part: The part of the time that it takes; see `Session`.
    """

    __slots__ = ("_asked_s", "_filter", "_ran_s", "asks", "attachment", "part", "timed")

    def __init__(self, attachment: A) -> None:
        self.attachment = attachment
        self._filter = attachment.filter
        self.asks, self.timed = self._filter.asks, self._filter.timed
        self.part = "handlers_s"
        if isinstance(attachment, CheckpointTrigger):
            self.part = "saves_s"
        elif isinstance(attachment, Handler) and attachment.validates:
            self.part = "validation_s"
        self._ran_s: float | None = None
        self._asked_s: float | None = None

    def admits(
        self,
        total: int,
        epoch: int,
        began_s: float,
        view: Callable[[], Any] = lambda: None,
    ) -> bool:
        """Returns whether it runs at a firing. Its filter is evaluated once.

        Args:
            total: The number of the firing over the lifetime of the state.
            epoch: The number of the firing within the epoch.
            began_s: When the run began.
            view: Returns the argument of a function filter.
        """
        if not (self.asks or self.timed):
            return self._filter.next_match(total - 1, epoch - 1, 1) is not None
        if not self.timed:
            return self._filter.matches(Firing(total, epoch, 0.0, view))
        self._asked_s = now()
        elapsed_s = self._asked_s - (began_s if self._ran_s is None else self._ran_s)
        return self._filter.matches(Firing(total, epoch, elapsed_s, view))

    def mark(self) -> None:
        """Records that it runs, at the time when its filter was evaluated."""
        self._ran_s = self._asked_s
