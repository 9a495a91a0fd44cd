"""The sessions of a run: one record per call of `run` that has worked on it.

    state.sessions[-1].data_s               # seconds that the current session waited for data
    sum(one.lost_s for one in state.sessions)

A run that is killed and resumed has several sessions. Its checkpoints keep the earlier ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """The part of a run that one call of `run`, `final_state` or `stream` did, and its seconds.

    Attributes:
        began: When it began, in seconds since 1970.
        first_step: The step that it began after, 0 for a fresh run.
        last_step: The number of steps that were complete when this record was made.
        elapsed_s: The seconds from its beginning to when this record was made.
        start_s: Seconds before the first event: the first batch, the first state, all checks.
        data_s: Seconds spent waiting for data.
        compile_s: Seconds spent compiling the step, or loading it from JAX's cache.
        dispatch_s: Seconds spent dispatching blocks to the device.
        validation_s: Seconds spent in validations.
        handlers_s: Seconds spent in other handlers, and in observers.
        saves_s: Seconds spent waiting for checkpoints.
        lost_s: Seconds after ``elapsed_s`` that the session still ran, before it was killed. What
            it did in this time was lost and is repeated. It is known if the session wrote
            checkpoints and its process died, to within a few seconds. Otherwise it is 0. A session
            that was killed before its first checkpoint has no record of its own, and the last one
            of these counts here.
        by_handler: The seconds of each handler, observer, validation and checkpoint by its name.

    Example:
        >>> import jaxloop as jl
        >>> state = jl.loop(lambda batch, total: total + batch).run([1, 2], init_state=0)
        >>> [(session.first_step, session.last_step) for session in state.sessions]
        [(0, 2)]
    """

    began: float
    first_step: int
    last_step: int
    elapsed_s: float
    start_s: float = 0.0
    data_s: float = 0.0
    compile_s: float = 0.0
    dispatch_s: float = 0.0
    validation_s: float = 0.0
    handlers_s: float = 0.0
    saves_s: float = 0.0
    lost_s: float = 0.0
    by_handler: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def device_s(self) -> float:
        """The remaining seconds: the device worked, and the engine waited or was idle."""
        others = self.data_s + self.compile_s + self.dispatch_s + self.validation_s
        others += self.start_s + self.handlers_s + self.saves_s
        return max(0.0, self.elapsed_s - others)


class Measuring(Protocol):
    """The clock of the current session."""

    def session_parts(self) -> dict[str, Any]:
        """Returns the arguments of a `Session`, as of now, without the steps."""


class Sessions:
    """The sessions of a state, whose last one is measured when they are first read.

    Args:
        earlier: The complete sessions.
        first_step: The step after which the current session began.
        clock: The clock of the current session. None if there is none.
        step: The number of steps that are complete.
    """

    __slots__ = ("_clock", "_earlier", "_first_step", "_step", "_value")

    def __init__(
        self,
        earlier: tuple[Session, ...] = (),
        first_step: int = 0,
        clock: Measuring | None = None,
        step: int = 0,
    ) -> None:
        self._earlier, self._first_step = earlier, first_step
        self._clock, self._step = clock, step
        self._value: tuple[Session, ...] | None = earlier if clock is None else None

    def at(self, step: int) -> Sessions:
        """Returns the same sessions after another step, to be measured anew."""
        return Sessions(self._earlier, self._first_step, self._clock, step)

    def get(self) -> tuple[Session, ...]:
        """Returns the sessions."""
        if self._value is None:
            assert self._clock is not None
            parts = self._clock.session_parts()
            current = Session(first_step=self._first_step, last_step=self._step, **parts)
            self._value = (*self._earlier, current)
            self._clock = None  # a state that is kept for long does not keep the run
        return self._value


NO_SESSIONS = Sessions()
