"""Observers, which see a snapshot from the time of the event and run while the device works.

    observers = Observers(spec.attachments, progress, clock, activity)
    observers.queue_block(64, rows)         # the firings inside a block
    observers.queue_firing(event)           # any other firing
    ...                                     # the next block is dispatched
    observers.show(observers.take())

Nothing is computed for an observer until it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxloop._core.events import ITERATION_EVENTS, Event
from jaxloop._core.lazy import Constant
from jaxloop._core.observing import ClosedObserver, FailingObserver, SyncedObserver
from jaxloop._core.schedule import matches
from jaxloop._core.state import EventCounts, Snapshot, make
from jaxloop._engine.activity import CALLING, Activity
from jaxloop._engine.attached import Attached
from jaxloop._engine.clock import RunClock, now
from jaxloop._engine.progress import Progress
from jaxloop._program.metric_rows import MetricRow, MetricRows
from jaxloop._spec import Attachment, Observer, ObserverFn, RunStart


class _Pending(NamedTuple):
    """A firing that an observer has not seen yet. ``ask`` has its counts for a function filter."""

    observer: Attached[Observer]
    snapshot: Snapshot
    ask: tuple[int, int] | None


class _Inside(NamedTuple):
    """A firing inside a block. Tuples of these sort in the order in which they fire."""

    when: int
    order: int
    iteration: int
    observer: Attached[Observer]
    event: Event


class Observers:
    """The observers of a run, and the firings that they have not seen yet.

    Args:
        attachments: All attachments of the loop.
        progress: The source of snapshots.
        clock: Counts the seconds that observers take.
        activity: Records which observer runs.

    Attributes:
        events: The events with at least one observer.
        inside: Whether any observer may see an iteration inside a block.
        timed: Whether a clock decides when one of them runs.
        queue: The firings that they have not seen yet.
    """

    def __init__(
        self,
        attachments: Sequence[Attachment],
        progress: Progress,
        clock: RunClock,
        activity: Activity,
    ) -> None:
        self._progress, self._clock, self._activity = progress, clock, activity
        self._all = [Attached(one) for one in attachments if isinstance(one, Observer)]
        self._opened: dict[int, ObserverFn] = {}
        self._synced: list[SyncedObserver] = []
        self._closed_too: list[ClosedObserver] = []
        self.queue: list[_Pending] = []
        self._index()

    def _index(self) -> None:
        """Finds the observers of each event, and those that may see iterations inside blocks."""
        self._by_event = {
            event: [one for one in self._all if event in one.attachment.events] for event in Event
        }
        # A clock is read between blocks, not inside them.
        self._inner = [
            (order, one, event)
            for order, one in enumerate(self._all)
            for event in ITERATION_EVENTS
            if event in one.attachment.events and not one.timed
        ]
        self.events = frozenset(event for event, those in self._by_event.items() if those)
        self.inside = bool(self._inner)
        self.timed = any(one.timed for one in self._all)

    @property
    def openable(self) -> bool:
        """Whether any of them is opened for each run."""
        return any(one.attachment.open is not None for one in self._all)

    def open(self, start: RunStart) -> None:
        """Opens the observers for a run, and leaves out those that do not want to see it."""
        unused: list[Attached[Observer]] = []
        for attached in self._all:
            one = attached.attachment
            if one.open is not None:
                self._activity.now = ("while preparing the observer `{}`", one.name)
                opened = one.open(start)
                if opened is None:
                    unused.append(attached)
                    continue
                self._opened[id(one)] = opened
                if isinstance(opened, SyncedObserver):
                    self._synced.append(opened)
        if unused:
            self._all = [one for one in self._all if one not in unused]
            self._index()

    def close_too(self, opened: object) -> None:
        """Closes a handler that was opened for this run together with the observers."""
        if isinstance(opened, ClosedObserver):
            self._closed_too.append(opened)

    @property
    def synced(self) -> bool:
        """Whether any of them makes durable what it has seen."""
        return bool(self._synced)

    def sync(self) -> None:
        """Makes durable what they have seen."""
        for one in self._synced:
            one.sync()

    def queue_firing(self, event: Event) -> None:
        """Queues the firing of ``event`` for the observers whose filters match."""
        progress = self._progress
        total, epoch = progress.firings[event]
        snapshot: Snapshot | None = None
        for one in self._by_event[event]:
            if not one.asks and not one.admits(total, epoch, self._clock.began_s):
                continue
            if not one.asks:
                one.mark()
            if snapshot is None:
                if isinstance(progress.lazy_metrics, MetricRow):
                    progress.lazy_metrics.start()
                snapshot = make(Snapshot, progress.to_snapshot())
            self.queue.append(_Pending(one, snapshot, (total, epoch) if one.asks else None))

    def queue_block(self, count: int, rows: MetricRows) -> None:
        """Queues the firings inside a block: all but its first start and its last completion.

        Args:
            count: The number of iterations in the block. The progress is at its first iteration.
            rows: The metrics after each iteration.
        """
        progress = self._progress
        firings: list[_Inside] = []
        for order, one, event in self._inner:
            total, epoch = progress.firings[event]
            starts = event is Event.ITERATION_STARTED
            for n in matches(one.attachment.filter, total, epoch, count - 1):
                firings.append(_Inside(2 * n + starts, order, n, one, event))
        if not firings:
            return
        firings.sort(key=_in_order)
        rows.request(0, count)
        fields = progress.to_snapshot()
        counts = fields["counts"].counts
        snapshot, last = Snapshot(), -1
        for when, _, n, one, event in firings:
            if when != last:
                started = n if event is Event.ITERATION_STARTED else n - 1
                mine = {
                    **fields,
                    "iteration": progress.iteration + started,
                    "step": progress.step + n,
                    "event": event,
                    "counts": EventCounts(counts, started, n),
                    "lazy_metrics": MetricRow(rows, n - 1, progress.added),
                }
                snapshot, last = make(Snapshot, mine), when
            ask = None
            if one.asks:
                total, epoch = counts[event]
                ask = (total + n, epoch + n)
            self.queue.append(_Pending(one, snapshot, ask))

    def take(self) -> list[_Pending]:
        """Returns the queue, in order, and starts a new one."""
        queue, self.queue = self.queue, []
        return queue

    def show(self, queue: list[_Pending]) -> None:
        """Runs the observers of a queue. If one raises, those after it stay queued."""
        if not queue:
            return
        began, num_shown, clock = now(), 0, self._clock
        clock.waited_s = 0.0
        try:
            for attached, snapshot, ask in queue:
                num_shown += 1
                one = attached.attachment
                at = (snapshot.event, snapshot.epoch, snapshot.iteration)
                self._activity.now = (CALLING, "observer", one.name, *at)
                if ask is not None:
                    if not attached.admits(*ask, clock.began_s, Constant(snapshot).get):
                        continue
                    attached.mark()
                self._opened.get(id(one), one.fn)(snapshot)
                ended = now()
                clock.add("handlers_s", one.name, ended - began)
                began = ended
        except BaseException:
            self.queue = queue[num_shown:] + self.queue
            raise

    def flush(self) -> None:
        """Runs everything that is queued."""
        self.show(self.take())

    def fail(self, failure: BaseException) -> None:
        """Tells the observers of the error that ends the run."""
        opened: list[object] = [*self._opened.values()]
        told = [one for one in opened if isinstance(one, FailingObserver)]
        self._call_all([functools.partial(one.fail, failure) for one in told])

    def close(self) -> None:
        """Closes every observer, even if closing another one fails."""
        closing = [self._close_of(one.attachment) for one in self._all]
        closing += [one.close for one in self._closed_too]
        self._call_all([close for close in closing if close is not None])

    def _close_of(self, one: Observer) -> Callable[[], None] | None:
        opened = self._opened.get(id(one))
        if opened is None:
            return None if one.open is not None else one.close
        return opened.close if isinstance(opened, ClosedObserver) else None

    def _call_all(self, calls: list[Callable[[], None]]) -> None:
        error: Exception | None = None
        for call in calls:
            try:
                call()
            except Exception as failed:
                if error is None:
                    error = failed
                else:
                    error.add_note(
                        f"jaxloop: another error followed: {type(failed).__name__}: {failed}"
                    )
        if error is not None:
            raise error


def _in_order(firing: _Inside) -> tuple[int, int]:
    return firing.when, firing.order
