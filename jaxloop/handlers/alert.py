"""Alerts: a function or a webhook hears when a run halts, fails or sees NaN.

    loop = alert(loop, "https://hooks.example.com/T123", title="digits")
    loop = alert(loop, lambda alert: print(alert.message), on="nan", every=100)

An alert never fails a run. If it cannot be delivered, the run logs a warning and continues.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args
from urllib.parse import urlsplit

from jaxloop._core.checks import as_number, check_count, check_string
from jaxloop._core.dry import left_out
from jaxloop._core.events import Event
from jaxloop._core.filters import ALWAYS, Filter, every_seconds
from jaxloop._core.filters import every as every_nth
from jaxloop._core.state import Snapshot
from jaxloop._progress.figures import counted
from jaxloop._spec import Observer, ObserverFn, RunStart, SpecT
from jaxloop.errors import ArgumentError, ArgumentTypeError, first_line, unknown_name
from jaxloop.handlers.webhook import Webhook

logger = logging.getLogger("jaxloop")

AlertKind: TypeAlias = Literal["halted", "failed", "nan", "completed", "interrupted"]
"""What an alert is about."""

_KINDS: tuple[AlertKind, ...] = get_args(AlertKind)

_ENDS_EPOCH = (Event.EPOCH_COMPLETED, Event.EPOCH_HALTED)
_ENDS = (*_ENDS_EPOCH, Event.COMPLETED, Event.HALTED)


@dataclasses.dataclass(frozen=True)
class Alert:
    """What happened in a run, and where.

    Attributes:
        kind: "halted", "failed", "nan", "completed" or "interrupted".
        message: A line of text that says all this.
        epoch: The epoch, from 0, or None if it is not known.
        iteration: The iteration in the epoch, or None.
        step: The number of iterations completed since the start, or None.
        metrics: The scalar metrics of the epoch so far.
        error: The exception that ended the run, or None.
    """

    kind: AlertKind
    message: str
    epoch: int | None = None
    iteration: int | None = None
    step: int | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error: BaseException | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns what a webhook gets, without the exception.

        A number that is not finite becomes text, because JSON has no such numbers.

        Example:
            >>> Alert("nan", "loss is nan", 0, 3, 3, {"loss": float("nan")}).to_json()["metrics"]
            {'loss': 'nan'}
        """
        record = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "error"
        }
        record["metrics"] = {
            name: number if math.isfinite(number) else str(number)
            for name, number in self.metrics.items()
        }
        # These are the keys from which Slack and Mattermost, and Discord, take a message.
        return {"text": self.message, "content": self.message, **record}


_OFTEN = every_seconds(10.0)

AlertFn: TypeAlias = Callable[[Alert], object]
"""A function that gets an alert. Its result is ignored."""


def alert(
    loop: SpecT,
    to: AlertFn | str,
    *,
    on: AlertKind | Sequence[AlertKind] = ("halted", "failed", "nan"),
    title: str = "jaxloop",
    metrics: Sequence[str] | None = None,
    every: int | Filter | None = _OFTEN,
    timeout_s: float = 5.0,
) -> SpecT:
    """Calls a function or a webhook when the run halts, fails or sees NaN.

    A webhook gets a POST request with JSON: the attributes of an `Alert` and, for chat services,
    the message as ``text`` and ``content``. A thread sends it, so a slow server does not delay the
    run. At its end, the run waits at most ``timeout_s`` for what is not sent yet. A function is
    called in the thread of the run. If the function raises, or the request fails, the run logs a
    warning and continues.

    Args:
        loop: The loop.
        to: The function, which gets an `Alert`, or the URL of the webhook. The URL may contain a
            secret, so no message of jaxloop shows it.
        on: When to alert, one kind or several. "halted" means that a handler halted the loop,
            "failed" that an exception ended the run, "nan" that a metric is NaN or infinite,
            "completed" that the run reached its end, and "interrupted" that a signal ended it. A
            mistake that is found before the first event raises without an alert.
        title: The beginning of the message, which tells this run from others.
        metrics: The names of the metrics to check for NaN. None means all scalar metrics. Each
            metric is reported once in a run.
        every: The metrics are checked for NaN at the end of each epoch and, besides, every so many
            iterations. It may be a filter, and None means only at the end of an epoch.
        timeout_s: How many seconds a request, and the end of the run, may wait for the server.

    Returns:
        A new loop with the alert.

    Raises:
        UnknownNameError: ``on`` has an unknown kind.
        ArgumentTypeError: ``to`` is neither a function nor a string, or another argument has the
            wrong type.
        ArgumentError: ``to`` is not the URL of a web server, or ``timeout_s`` is not positive.

    Example:
        >>> import jaxloop as jl
        >>> loop = jl.loop(lambda b, s: jl.emit(s, x=b)).metric("x", per="batch")
        >>> loop = loop.alert(lambda alert: print(alert.message), title="test")
        >>> _ = loop.run([1.0, float("inf")], epochs=1)
        test: x is inf in epoch 0, after step 2
    """
    kinds = _checked_kinds(on)
    _check(to, title, metrics, timeout_s)
    cadence = _cadence(every)
    names = None if metrics is None else tuple(metrics)
    config = _Config(to, kinds, title, names, timeout_s)
    loop = loop.attach(_observer(_ENDS, ALWAYS, config.at_ends))
    if cadence is None or "nan" not in kinds:
        return loop
    return loop.attach(_observer((Event.ITERATION_COMPLETED,), cadence, config.at_iteration))


def _observer(
    events: tuple[Event, ...], filter: Filter, open: Callable[[RunStart], ObserverFn]
) -> Observer:
    return Observer(events, filter, "alert", _ignore, open=open, in_dry_run=left_out)


def _ignore(snapshot: Snapshot) -> None:
    """Does nothing: `Observer.open` makes the observer of each run."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Config:
    """The arguments of `alert`. The recipient is not shown, because a URL may contain a secret."""

    to: AlertFn | str = dataclasses.field(repr=False)
    kinds: frozenset[str]
    title: str
    metrics: tuple[str, ...] | None
    timeout_s: float

    def at_ends(self, start: RunStart) -> _Watch:
        """Returns the observer of one run, for the ends of its epochs and its own."""
        watch: _Watch = start.shared.setdefault(self, _Watch(self))
        return watch

    def at_iteration(self, start: RunStart) -> ObserverFn:
        """Returns the observer of iterations, which shares what is told already."""
        return self.at_ends(start).check_metrics


class _Watch:
    """The alerts of one run. Each metric that is not finite is told once.

    Args:
        config: The arguments of `alert`.
    """

    def __init__(self, config: _Config) -> None:
        self._config = config
        to = config.to
        self._webhook = Webhook(to, config.timeout_s) if isinstance(to, str) else None
        self._told: set[str] = set()

    def __call__(self, snapshot: Snapshot) -> None:
        if snapshot.event in _ENDS_EPOCH:
            if "nan" in self._config.kinds:
                self.check_metrics(snapshot)
        else:
            self._tell_the_end(snapshot)

    def check_metrics(self, snapshot: Snapshot) -> None:
        """Tells of each metric that is not finite, unless it is told already."""
        numbers, names = _numbers(snapshot.metrics), self._config.metrics
        new = [
            name
            for name, number in numbers.items()
            if not math.isfinite(number)
            and name not in self._told
            and (names is None or name in names)
        ]
        if not new:
            return
        self._told.update(new)
        which = ", ".join(f"{name} is {numbers[name]}" for name in new)
        what = f"{which} in epoch {snapshot.epoch}, after step {snapshot.step}"
        self._tell("nan", what, **_place(snapshot), metrics=numbers)

    def _tell_the_end(self, snapshot: Snapshot) -> None:
        kind = snapshot.status
        if kind not in self._config.kinds or kind == "running":
            return
        numbers = _numbers(snapshot.metrics)
        by = f" by {snapshot.halted_by}" if snapshot.halted_by else ""
        what = f"{kind}{by} in epoch {snapshot.epoch}, after step {snapshot.step}"
        if kind == "completed":
            done = counted(snapshot.epoch, "epoch"), counted(snapshot.step, "step")
            what = f"completed {' and '.join(done)}"
        self._tell(kind, what + _listed(numbers), **_place(snapshot), metrics=numbers)

    def fail(self, error: BaseException) -> None:
        """Tells of the error that ends the run."""
        kind: AlertKind = "failed" if isinstance(error, Exception) else "interrupted"
        if kind not in self._config.kinds:
            return
        state = vars(error).get("loop_state")
        text = f": {first_line(error)}" if str(error) else ""
        what = f"{kind} with {type(error).__name__}{text}"
        if isinstance(state, Snapshot):
            what = f"{what} (epoch {state.epoch}, after step {state.step})"
            self._tell(kind, what, **_place(state), metrics=_numbers(state.metrics), error=error)
        else:
            self._tell(kind, what, error=error)

    def close(self) -> None:
        """Waits for what is not sent yet, but not for long."""
        if self._webhook is not None:
            self._webhook.close()

    def _tell(self, kind: AlertKind, what: str, **fields: Any) -> None:
        one = Alert(kind, f"{self._config.title}: {what}", **fields)
        if self._webhook is not None:
            self._webhook.send(one.to_json())
        elif callable(self._config.to):
            try:
                self._config.to(one)
            except Exception:
                logger.warning("alert: the function failed for: %s", one.message, exc_info=True)


def _place(snapshot: Snapshot) -> dict[str, int]:
    return {
        "epoch": snapshot.epoch,
        "iteration": snapshot.iteration,
        "step": snapshot.step,
    }


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: as_number(value) for name, value in metrics.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _listed(numbers: Mapping[str, float]) -> str:
    return "".join(f", {name} {number:.4g}" for name, number in numbers.items())


# --- checks --------------------------------------------------------------------------------------


def _cadence(every: object) -> Filter | None:
    if every is None or isinstance(every, Filter):
        return every
    check_count("every", every, at_least=1, where="alert")
    return every_nth(int(every))  # type: ignore[call-overload]  # it is a whole number


def _checked_kinds(on: object) -> frozenset[str]:
    kinds = (on,) if isinstance(on, str) else on
    if not isinstance(kinds, Sequence) or not kinds:
        raise ArgumentTypeError(
            f"alert: on must be a kind of alert or a list of them, got {on!r}",
            fix=f"pass some of: {', '.join(_KINDS)}",
        )
    for kind in kinds:
        if kind not in _KINDS:
            raise unknown_name("kind of alert", kind, _KINDS)
    return frozenset(kinds)


def _check(to: object, title: object, metrics: object, timeout_s: object) -> None:
    if isinstance(to, str):
        _check_url(to)
    elif not callable(to):
        raise ArgumentTypeError(
            f"alert: to must be a function or a URL, got {to!r}",
            fix="pass a function that takes a jl.handlers.Alert, or the URL of a webhook",
        )
    check_string("alert", "title", title, fix="pass the name of the run")
    names = metrics if isinstance(metrics, Sequence) and not isinstance(metrics, str) else None
    if metrics is not None and (names is None or not all(isinstance(one, str) for one in names)):
        raise ArgumentTypeError(
            f"alert: metrics must be a list of names or None, got {metrics!r}",
            fix="pass names such as ['loss']",
        )
    seconds = as_number(timeout_s)
    if seconds is None or not 0 < seconds < math.inf:
        raise ArgumentError(
            f"alert: timeout_s must be a positive number of seconds, got {timeout_s!r}",
            fix="pass a number such as 5",
        )


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and " " not in url
        kind = parts.scheme or "no scheme"
    except ValueError:
        good, kind = False, "another form"
    if not good:
        # The rest of the URL may be a secret.
        raise ArgumentError(
            f"alert: a URL must be that of a web server, got one with {kind[:20]}",
            fix="pass a URL that begins with https://",
        )
