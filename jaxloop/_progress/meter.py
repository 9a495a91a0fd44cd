"""The meter of a run: what is shown now, made from snapshots and a clock.

    meter = Meter(start.snapshot, num_examples=32)
    meter.see(snapshot)
    meter.now()                 # a `View`: counts, rates, the time that is left, metrics

Rates count only the iterations of this session. They begin with the first snapshot that the meter
sees after an iteration, so that compiling does not count.
"""

from __future__ import annotations

import collections
import dataclasses
import time

from jaxloop._core.bounds import limited
from jaxloop._core.events import Event
from jaxloop._core.state import Snapshot
from jaxloop._progress.figures import named_numbers

clock = time.monotonic
_WINDOW_S = 10.0
"""The rate is that of the last seconds."""


@dataclasses.dataclass(frozen=True)
class View:
    """What is shown during a run.

    Attributes:
        epochs: The number of completed epochs.
        max_epochs: The number of all epochs, or None.
        batches: The number of completed iterations of this epoch.
        max_batches: The number of iterations of an epoch, or None while it is unknown.
        steps: The number of completed steps.
        max_steps: The number of all steps, or None.
        metrics: The names and the values of the metrics, as text.
        elapsed_s: The seconds since this session began.
        left_s: The seconds that are left, or None while they are unknown.
        batches_per_s: The rate, or None while it is unknown.
        examples_per_s: The same for examples, or None.
        between: Whether the epoch of ``batches`` has ended and is counted in ``epochs``.
        note: What the run does when there is no rate yet, or "".
    """

    epochs: int = 0
    max_epochs: int | None = None
    batches: int = 0
    max_batches: int | None = None
    steps: int = 0
    max_steps: int | None = None
    metrics: tuple[tuple[str, str], ...] = ()
    elapsed_s: float = 0.0
    left_s: float | None = None
    batches_per_s: float | None = None
    examples_per_s: float | None = None
    between: bool = False
    note: str = ""

    def later(self, seconds: float) -> View:
        """Returns the same view, some seconds later."""
        left_s = None if self.left_s is None else max(0.0, self.left_s - seconds)
        return dataclasses.replace(self, elapsed_s=self.elapsed_s + seconds, left_s=left_s)

    @property
    def share(self) -> float | None:
        """The share of the whole run that is done, or None if it is unknown.

        Example:
            >>> View(epochs=1, max_epochs=4, batches=5, max_batches=10).share
            0.375
        """
        if self.max_epochs is None:
            return None if not self.max_steps else min(1.0, self.steps / self.max_steps)
        within = 0.0
        if self.max_batches and not self.between:
            within = min(1.0, self.batches / self.max_batches)
        return min(1.0, (self.epochs + within) / max(1, self.max_epochs))


class Meter:
    """Turns snapshots into what is shown.

    Args:
        snapshot: The snapshot before the first step of this session.
        num_examples: The number of examples in a batch, or None if it is unknown.
        max_time_s: The seconds after which the run ends, or None.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        num_examples: int | None = None,
        max_time_s: float | None = None,
    ) -> None:
        self._num_examples, self._max_time_s = num_examples, max_time_s
        self._began_s = clock()
        self._first_step = snapshot.step
        self._samples: collections.deque[tuple[float, int]] = collections.deque()
        self._first: tuple[float, int] | None = None
        self._per_epoch = _iterations_per_epoch(snapshot)
        self._view = self._counts(snapshot)

    def see(self, snapshot: Snapshot) -> None:
        """Takes in a snapshot. Reading its metrics waits for the device, so it comes first."""
        metrics = tuple(named_numbers(snapshot.metrics))
        now_s = clock()
        if snapshot.step > self._first_step:
            self._samples.append((now_s, snapshot.step))
            if self._first is None:
                self._first = self._samples[0]
            while len(self._samples) > 2 and self._samples[1][0] < now_s - _WINDOW_S:
                self._samples.popleft()
        if snapshot.event is Event.EPOCH_COMPLETED:
            self._per_epoch = snapshot.iteration
        self._view = dataclasses.replace(self._counts(snapshot), metrics=metrics)

    def now(self) -> View:
        """Returns what is shown now."""
        elapsed_s = clock() - self._began_s
        view = self._view
        per_s = self._per_second()
        note = "" if view.steps > self._first_step else "first step"
        examples = None if per_s is None or self._num_examples is None else self._num_examples
        return dataclasses.replace(
            view,
            elapsed_s=elapsed_s,
            left_s=self._left_s(view, elapsed_s),
            batches_per_s=per_s,
            examples_per_s=None if examples is None or per_s is None else per_s * examples,
            note=note,
        )

    def _counts(self, snapshot: Snapshot) -> View:
        ended = snapshot.event in (Event.EPOCH_COMPLETED, Event.EPOCH_HALTED)
        max_batches = snapshot.max_iteration
        if max_batches is None:
            max_batches = self._per_epoch
        if snapshot.max_step is not None and max_batches is not None:
            max_batches = limited(
                max_batches, snapshot.iteration + max(0, snapshot.max_step - snapshot.step)
            )
        # During its event, an iteration that has completed is not yet in the counter of the epoch.
        completed = snapshot.event is Event.ITERATION_COMPLETED
        return View(
            epochs=snapshot.epoch + ended,
            max_epochs=snapshot.max_epoch,
            batches=snapshot.iteration + completed,
            max_batches=max_batches,
            steps=snapshot.step,
            max_steps=snapshot.max_step,
            between=ended,
        )

    def _per_second(self) -> float | None:
        if len(self._samples) < 2:
            return None
        (first_s, first), (last_s, last) = self._samples[0], self._samples[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s and last > first else None

    def _left_s(self, view: View, elapsed_s: float) -> float | None:
        """Returns the seconds that are left, from the mean rate of the session and its limit."""
        left_s = self._steps_left_s(view)
        if self._max_time_s is None:
            return left_s
        limit_s = max(0.0, self._max_time_s - elapsed_s)
        return limit_s if left_s is None else min(left_s, limit_s)

    def _steps_left_s(self, view: View) -> float | None:
        if self._first is None or not self._samples:
            return None
        first_s, first = self._first
        last_s, last = self._samples[-1]
        steps = _steps_left(view)
        if steps is None or last <= first:
            return None
        return max(0.0, steps * (last_s - first_s) / (last - first) - (clock() - last_s))


def _steps_left(view: View) -> int | None:
    left = []
    if view.max_steps is not None:
        left.append(view.max_steps - view.steps)
    if view.max_epochs is not None and view.max_batches is not None:
        done = view.epochs * view.max_batches + (0 if view.between else view.batches)
        left.append(view.max_epochs * view.max_batches - done)
    return max(0, min(left)) if left else None


def _iterations_per_epoch(snapshot: Snapshot) -> int | None:
    """Returns the number of iterations per epoch of a resumed run, if its epochs were equal."""
    done = snapshot.step - snapshot.iteration
    if snapshot.epoch and done > 0 and done % snapshot.epoch == 0:
        return done // snapshot.epoch
    return None
