"""Watched metrics: whether a handler or a checkpoint trigger can read the metric that it watches.

    check_watched_metrics(spec)             # raises, before the first step, if one can never exist
    watched = Watched(spec)
    watched.is_waiting(attachment, state)   # the metric has no value yet in this epoch

Each epoch begins with new metrics. A metric that a handler such as `validate` adds exists from then
on to the end of that epoch. In an epoch, or a part of one, without such a value there is nothing to
judge, so an attachment that watches the metric does not run, and the firing does not count for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import TypeAlias

from jaxloop._core.events import ITERATION_EVENTS, Event
from jaxloop._core.filters import Filter, Firing
from jaxloop._core.state import State
from jaxloop._core.types import Better
from jaxloop._spec import Attachment, CheckpointTrigger, Handler, LoopSpec, RunStart
from jaxloop.errors import MissingMetricError, missing_metric
from jaxloop.metrics.declare import EachScalar
from jaxloop.metrics.names import better_by_name, names_of_value

_Watching: TypeAlias = Handler | CheckpointTrigger

_ORDER = {
    Event.EPOCH_STARTED: 1,
    Event.ITERATION_STARTED: 2,
    Event.ITERATION_COMPLETED: 2,
    Event.EPOCH_COMPLETED: 3,
    Event.EPOCH_HALTED: 3,
    Event.COMPLETED: 4,
    Event.HALTED: 4,
}
"""The order of events from the start of an epoch, when the metrics begin anew, to the next one."""

_ONCE_AN_EPOCH = (Event.EPOCH_STARTED, Event.EPOCH_COMPLETED, Event.EPOCH_HALTED)

_LOOK_AHEAD = 10_000
"""How many epochs two filters are compared for."""


# --- before the first step -----------------------------------------------------------------------


def check_watched_metrics(spec: LoopSpec, names: Collection[str] | None = None) -> None:
    """Raises if a watched metric can never exist when it is read.

    A user's own handler may add any metric. If one runs before the read, this raises nothing.

    Args:
        spec: The loop.
        names: The names of the metrics' values, or None while they are unknown. A metric of several
            outputs has a value for each, such as ``accuracy/head``.

    Raises:
        MissingMetricError: The error says what adds the metric, and why that is too late.
    """
    if names is None and any(isinstance(one.metric, EachScalar) for one in spec.metrics):
        return  # each scalar that the step reports is a metric
    declared = [metric.name for metric in spec.metrics]
    known = declared if names is None else names
    for one, name in _watches(spec, known):
        if names is None and _is_among(name, declared):
            continue
        if not (_adders(spec, one, name, reaching=True) or _adders(spec, one, None, reaching=True)):
            raise _never_exists(spec, one, name, known)


def _watches(spec: LoopSpec, declared: Collection[str]) -> list[tuple[_Watching, str]]:
    """Returns each attachment with each metric that it watches and that is not declared."""
    return [
        (one, name)
        for one in spec.attachments
        if isinstance(one, _Watching)
        for name in one.watches
        if name not in declared
    ]


def _is_among(name: str, names: Collection[str]) -> bool:
    """Returns whether a metric is one of those, or a value of one of several outputs."""
    return any(one in names for one in names_of_value(name))


def _adders(
    spec: LoopSpec, one: _Watching, name: str | None, *, reaching: bool = False
) -> list[Handler]:
    """Returns the other handlers that add a metric, or that may add any if ``name`` is None.

    Args:
        spec: The loop.
        one: The attachment that watches the metric.
        name: The metric.
        reaching: Whether to leave out handlers whose values ``one`` never finds.
    """
    found = []
    before = True
    for other in spec.attachments:
        if other is one:
            before = False
        elif (
            isinstance(other, Handler)
            and _adds(spec, other, name)
            and (not reaching or _reaches(other, one, before=before))
        ):
            found.append(other)
    return found


def _adds(spec: LoopSpec, handler: Handler, name: str | None) -> bool:
    """Returns whether a handler adds a metric, or whether it may add any if ``name`` is None."""
    added = handler.added(spec)
    return added is None if name is None else _is_among(name, added or ())


def _reaches(source: Handler, one: _Watching, *, before: bool) -> bool:
    """Returns whether what ``source`` adds can exist when ``one`` runs.

    Args:
        source: The handler that adds a metric.
        one: The attachment that watches it.
        before: Whether ``source`` was attached before ``one``.
    """
    for event in one.events:
        if event in source.events:
            if not before:
                continue  # ``one`` would read a value of an earlier firing
            if _coincide(source.filter, one.filter, event):
                return True
        if any(_lasts(earlier, event) for earlier in source.events):
            return True
    return False


def _lasts(earlier: Event, event: Event) -> bool:
    """Returns whether a metric that is added at one event still exists at another, later one."""
    if earlier is Event.STARTED:
        return event in (Event.COMPLETED, Event.HALTED)
    if earlier in ITERATION_EVENTS and event in ITERATION_EVENTS:
        return earlier is not event
    return _ORDER[earlier] < _ORDER.get(event, 0)


def _coincide(a: Filter, b: Filter, event: Event) -> bool:
    """Returns whether two filters may select a common firing, or firings of a common epoch."""
    if event not in _ONCE_AN_EPOCH or any(one.asks or one.timed for one in (a, b)):
        return True
    firings = (Firing(total, 1) for total in range(1, _LOOK_AHEAD + 1))
    return any(a.matches(firing) and b.matches(firing) for firing in firings)


def _never_exists(
    spec: LoopSpec, one: _Watching, name: str, known: Collection[str]
) -> MissingMetricError:
    """Returns the error for a metric that can never exist when ``one`` runs."""
    adders = _adders(spec, one, name)
    if not adders:
        handlers = [other for other in spec.attachments if isinstance(other, Handler)]
        added = [name for other in handlers for name in other.added(spec) or ()]
        return missing_metric(one.name, name, [*known, *added])
    source = adders[0]
    earlier = next(other for other in spec.attachments if other is one or other is source)
    common = [event for event in one.events if event in source.events]
    what = f"{one.name} reads the metric {name!r}"
    if not common:
        return MissingMetricError(
            f"{what} on {_listed(one)}, but {source.name} adds it on {_listed(source)}, and each "
            "epoch begins with new metrics",
            fix=f"attach both to one event, such as event={source.events[0].value!r}, "
            f"{source.name} first",
        )
    if earlier is one:
        return MissingMetricError(
            f"{what} on {common[0]} before {source.name} adds it, because {source.name} was "
            "attached later",
            fix=f"attach {source.name} before {one.name}",
        )
    return MissingMetricError(
        f"{what} when {one.filter!r}, but {source.name} adds it when {source.filter!r}, and these "
        "filters never select the same epoch",
        fix="pass the same filter= to both",
    )


def _listed(one: Attachment) -> str:
    return ", ".join(one.events)


# --- which values are better ---------------------------------------------------------------------


def known_better(spec: LoopSpec, names: Collection[str]) -> dict[str, Better | None]:
    """Returns which values are better of the metrics that a loop has or that its handlers add.

    Args:
        spec: The loop.
        names: The names of the values of its metrics.
    """
    found = better_by_name(spec.metrics, names)
    for one in spec.attachments:
        if isinstance(one, Handler):
            found.update(one.added(spec) or {})
    return found


def warn_of_unknown(attachments: Iterable[_Watching], start: RunStart) -> None:
    """Warns, once, of the metrics for which ``mode="auto"`` has no answer."""
    unknown = [
        (one.name, metric)
        for one in attachments
        if one.auto_mode
        for metric in one.watches
        if start.better_of(metric) is None
    ]
    if unknown:
        names = ", ".join(dict.fromkeys(name for name, _ in unknown))
        metrics = ", ".join(dict.fromkeys(repr(str(metric)) for _, metric in unknown))
        warnings.warn(
            f"{names}: mode='auto' cannot tell whether smaller or larger values of {metrics} are "
            "better, and takes the smaller ones\n  fix: pass mode='min' or mode='max'",
            stacklevel=2,
        )


# --- during a run --------------------------------------------------------------------------------


class Watched:
    """Which attachments of one run wait for a metric.

    Args:
        spec: The loop.
    """

    def __init__(self, spec: LoopSpec) -> None:
        # {attachment: {metric: whether a handler is known to add it}}
        self._names: dict[int, dict[str, bool]] = {}
        self._waiting: dict[int, tuple[_Watching, str]] = {}
        self._ran: set[int] = set()
        for one, name in _watches(spec, {one.name for one in spec.metrics}):
            known = bool(_adders(spec, one, name, reaching=True))
            self._names.setdefault(id(one), {})[name] = known

    def is_waiting(self, one: Attachment, state: State) -> bool:
        """Returns whether an attachment must not run, because its metric has no value yet.

        An attachment that needs a metric which no handler is known to add, and which it has never
        read before, is not waiting: the name may be wrong, and the attachment raises when it runs.
        """
        names = self._names.get(id(one))
        if names is None or not isinstance(one, _Watching):
            return False
        seen = one.unique and one.name in state.handler_state
        for name, known in names.items():
            if (known or seen) and name not in state.metrics:
                if not seen:
                    self._waiting[id(one)] = (one, name)
                return True
        self._ran.add(id(one))
        return False

    def warn(self) -> None:
        """Warns of attachments that were due but never ran. Called when a run is completed."""
        for key, (one, name) in self._waiting.items():
            if key in self._ran:
                continue
            warnings.warn(
                f"{one.name} never ran, because each time that it was due, {name!r} had no value "
                "in that epoch\n  fix: pass it the event= and filter= of the handler that adds "
                f"{name!r}, or run that handler more often",
                stacklevel=2,
            )
        self._waiting = {}
