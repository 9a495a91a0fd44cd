"""`State` and `Snapshot`, immutable values that describe a run.

    def show(state):
        print(state.epoch, state.metrics["loss"])      # computed here, because it is read here
        return "continue", state.replace(metrics={**state.metrics, "seen": 1.0})

Every field is declared once, here, with its meaning, whether a handler may change it, and whether
it is saved. The engine, the checkpoints and `State.replace` all read these declarations. To add a
field, add one line here, and set it in the engine.

A state is immutable, with one exception: `Progress`, the engine's own copy. Type checkers therefore
see the fields as writable, and the check happens at run time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal

from jaxloop._core.events import ITERATION_EVENTS, Event, Place, RunStatus
from jaxloop._core.lazy import EpochRecords, LazyDict, ReadOnlyDict
from jaxloop._core.loan import Loan, ShownLoan
from jaxloop._core.sessions import NO_SESSIONS, Session, Sessions
from jaxloop._core.types import PyTree, S
from jaxloop.errors import ArgumentTypeError, unknown_name

Counts = Mapping[Event, tuple[int, int]]
"""``{event: (total, within the epoch)}``."""


class EventCounts:
    """The number of firings of each event. The dict is made when it is read.

    Args:
        counts: The last recorded counts.
        started: Iterations that have started since.
        completed: Iterations that have completed since.
    """

    __slots__ = ("_since", "_value", "counts")

    def __init__(self, counts: Counts, started: int = 0, completed: int = 0) -> None:
        self.counts = counts
        self._since = (started, completed)
        self._value: ReadOnlyDict | None = None

    def get(self) -> ReadOnlyDict:
        """Returns ``{event: (total, within the epoch)}``."""
        if self._value is None:
            counted = dict(self.counts)
            for event, by in zip(ITERATION_EVENTS, self._since, strict=True):
                total, epoch = counted[event]
                counted[event] = (total + by, epoch + by)
            self._value = ReadOnlyDict(counted)
        return self._value


NO_COUNTS: Counts = {event: (0, 0) for event in Event}


OnChange = Literal["adopt", "refuse", "ignore"]
"""How the engine treats a field that a handler has changed."""


def _field(
    default: Any = dataclasses.MISSING,
    *,
    factory: Any = dataclasses.MISSING,
    on_change: OnChange = "ignore",
    saved_as: str | None = None,
    saved: bool = True,
    added_in: int = 1,
    internal: bool = False,
) -> Any:
    """Declares a field.

    Args:
        default: Its default value.
        factory: Makes the default value.
        on_change: How the engine treats a change by a handler.
        saved_as: Its key in the record of a checkpoint, if that differs from its name.
        saved: Whether it belongs in the record.
        added_in: The format of the record in which it was added.
        internal: Whether only jaxloop uses it. `dir` hides it, and `State.replace` refuses it.
    """
    metadata = {
        "on_change": on_change,
        "saved_as": saved_as,
        "saved": saved,
        "added_in": added_in,
        "internal": internal,
    }
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(eq=False, kw_only=True, repr=False)
class Snapshot:
    """An observer's view of one firing: counters and host values, without ``step_state``.

    Example:
        >>> Snapshot(epoch=0, iteration=2, step=3).step
        3
    """

    epoch: int = _field(0, on_change="refuse")
    """The current epoch, from 0."""
    max_epoch: int | None = _field(None, on_change="adopt")
    """The total number of epochs, or None if only `max_step` bounds the run."""
    iteration: int = _field(0, on_change="refuse")
    """The current iteration, from 0 in each epoch."""
    max_iteration: int | None = _field(None)
    """The number of iterations in an epoch, or None while it is unknown."""
    step: int = _field(0, on_change="refuse")
    """The number of iterations completed since the start."""
    max_step: int | None = _field(None, on_change="refuse", added_in=3)
    """The total number of steps, or None if the run has no such bound."""
    status: RunStatus = _field("running")
    """Whether the run is "running", "completed", "halted" or "interrupted"."""
    halted_by: str | None = _field(None)
    """The name of the handler that halted the loop, otherwise None."""
    event: Event | None = _field(None)
    """The event that is firing, or None between two firings."""
    counts: EventCounts = _field(
        factory=lambda: EventCounts(NO_COUNTS), saved_as="event_counts", internal=True
    )
    """The value behind `event_counts`."""
    lazy_metrics: LazyDict = _field(
        factory=lambda: LazyDict(dict), on_change="adopt", saved_as="metrics", internal=True
    )
    """The value behind `metrics`."""
    lazy_history: EpochRecords = _field(
        factory=EpochRecords, on_change="adopt", saved_as="history", internal=True
    )
    """The value behind `history`."""
    lazy_times: EpochRecords = _field(
        factory=EpochRecords, on_change="adopt", saved_as="times", internal=True
    )
    """The value behind `times`."""
    lazy_sessions: Sessions = _field(
        factory=lambda: NO_SESSIONS, added_in=5, saved_as="sessions", internal=True
    )
    """The value behind `sessions`."""

    @property
    def event_counts(self) -> Mapping[Event, tuple[int, int]]:
        """``{event: (total, within the epoch)}``; the current firing is counted."""
        return self.counts.get()

    @property
    def metrics(self) -> Mapping[str, Any]:
        """``{name: value}`` of this epoch so far, as NumPy values on the host."""
        return self.lazy_metrics.get()

    @property
    def history(self) -> Mapping[int, Mapping[str, Any]]:
        """``{epoch: metrics}`` of completed and halted epochs, as NumPy values on the host."""
        return self.lazy_history.get()

    @property
    def times(self) -> Mapping[int, float]:
        """``{epoch: seconds}``. Each is an `EpochTime`, with a breakdown of the seconds."""
        return self.lazy_times.get()

    @property
    def sessions(self) -> tuple[Session, ...]:
        """One `Session` per call that has worked on this run. The last is the current one.

        The current one is as of when you first read this.
        """
        sessions = self.lazy_sessions.get()
        # The snapshots inside a block share one measurement.
        if sessions and sessions[-1].last_step != self.step:
            return (*sessions[:-1], dataclasses.replace(sessions[-1], last_step=self.step))
        return sessions

    def __setattr__(self, name: str, value: Any) -> None:
        # The generated `__init__` assigns each field once. No other code may assign one.
        if name in self.__dict__ or name not in self.__dataclass_fields__:
            raise dataclasses.FrozenInstanceError(
                f"cannot assign to {name!r}: a {type(self).__name__} is immutable\n"
                f"  fix: return state.replace({name}=...) from a handler"
            )
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(
            f"cannot delete {name!r}: a {type(self).__name__} is immutable"
        )

    def __dir__(self) -> list[str]:
        internal = {f.name for f in dataclasses.fields(self) if f.metadata["internal"]}
        return [name for name in super().__dir__() if name not in internal]

    def __repr__(self) -> str:
        of_epochs = "" if self.max_epoch is None else f"/{self.max_epoch}"
        of_steps = "" if self.max_step is None else f"/{self.max_step}"
        return (
            f"{type(self).__name__}({self.status}, epoch {self.epoch}{of_epochs}, "
            f"iteration {self.iteration}, step {self.step}{of_steps}"
            + (f", event {self.event.value}" if self.event is not None else "")
            + (f", halted by {self.halted_by}" if self.halted_by else "")
            + ")"
        )


@dataclasses.dataclass(eq=False, kw_only=True, repr=False)
class State(Snapshot, Generic[S]):
    """The complete state of a run, from which you can resume it. It is immutable.

    Besides its public attributes, it holds the metric accumulators, the position in the data and
    the place in the order of events.

    Example:
        >>> import jaxloop as jl
        >>> state = jl.loop(lambda batch, total: total + batch).run([1, 2, 3], init_state=0)
        >>> int(state.step_state), state.step, state.status
        (6, 3, 'completed')
    """

    statics: Mapping[str, str] = _field(factory=ReadOnlyDict, added_in=2)
    """What the model was made of besides arrays: ``{path of an attribute: description}``.

    A run refuses to continue from a state of a model with other attributes, such as another dropout
    rate. To continue all the same, use ``state.replace(statics={})``.
    """
    outputs: PyTree = _field(factory=dict, on_change="adopt", saved=False)
    """The outputs that the last step reported with `emit`."""
    handler_state: Mapping[str, PyTree] = _field(factory=ReadOnlyDict, on_change="adopt")
    """``{name: pytree}``, the memory of the handlers.

    A checkpoint keeps numbers, text, bytes, NumPy and JAX arrays, keys, dicts, lists and plain
    tuples exactly. It refuses anything else.
    """
    loan: Loan = _field(factory=lambda: Loan({}, {}), saved=False, internal=True)
    """The value behind `step_state`, together with the accumulators."""
    place: Place = _field(Place.NEXT_EPOCH, saved_as="next", internal=True)
    """The next place in the order of events."""
    position: Any = _field(None, internal=True)
    """The position in the data. Its type, `Position`, belongs to a higher layer."""
    elapsed_s: float = _field(0.0, internal=True)
    """The seconds that this epoch has taken so far."""
    run_id: str | None = _field(None, added_in=2, internal=True)
    """What tells this run from others. A run that is resumed keeps it."""
    metric_meanings: Mapping[str, Mapping[str, str]] | None = _field(
        None, added_in=2, internal=True
    )
    """What the accumulators mean, by the names of the metrics. None if it is unknown."""
    reshaped: tuple[str, ...] = _field((), added_in=2, internal=True)
    """The paths of the step state's leaves that handlers added, removed or changed in shape."""
    first_step: int = _field(0, added_in=3, internal=True)
    """The step from which this run can be repeated, or 0.

    The run started from a state there, got other bounds, or was rewound.
    """
    requested_epochs: int | None = _field(None, added_in=2, internal=True)
    """The ``epochs=`` of the run, which `max_epoch` is if no handler changed it."""
    requested_iterations: int | None = _field(None, added_in=3, internal=True)
    """The ``iterations=`` of the run."""
    environment: Mapping[str, str] = _field(factory=ReadOnlyDict, added_in=4, internal=True)
    """The versions and devices of the run. It is empty if they are unknown."""
    last_checkpoint: str | None = _field(None, saved=False)
    """The folder of the newest complete checkpoint of this run, or None."""

    @property
    def step_state(self) -> S:
        """The pytree of arrays that the step carries. It stays valid for as long as you keep it."""
        self.loan.read = True
        step_state: S = self.loan.shown
        return step_state

    def replace(self, **changes: Any) -> State[S]:
        """Returns a copy with some attributes changed.

        Args:
            **changes: New values, by the names of the attributes.

        Raises:
            UnknownNameError: A name is not an attribute of a `State`.
            ArgumentTypeError: ``metrics`` is not a dict.

        Example:
            >>> State(epoch=1).replace(metrics={"loss": 2.0}).metrics
            {'loss': 2.0}
        """
        fields = dict(self.__dict__)
        for name, value in changes.items():
            if name not in _PUBLIC:
                raise unknown_name("attribute of State", name, _PUBLIC)
            if name == "step_state":
                fields["loan"] = Loan(value, self.loan.accumulators)
            elif name == "metrics":
                fields["lazy_metrics"] = _known_metrics(value)
            elif name in ("history", "times"):
                fields[f"lazy_{name}"] = EpochRecords.of(value)
            elif name == "event_counts":
                fields["counts"] = EventCounts(value)
            elif name in ("handler_state", "statics"):
                fields[name] = ReadOnlyDict(value)
            else:
                fields[name] = value
        state: State[S] = make(State, fields)
        return state


def make(cls: type[Any], fields: dict[str, Any]) -> Any:
    """Makes a `State` or a `Snapshot` from a dict of all its fields, and takes over the dict.

    For speed, this skips the generated ``__init__``, because an observer may see every iteration.
    """
    made = object.__new__(cls)
    made.__dict__.update(fields)
    return made


def shown_as(state: State[Any], show: Callable[[PyTree], Any]) -> State[Any]:
    """Returns a state whose ``step_state`` is ``show`` of the carried one.

    Runs and checkpoints continue from the carried one.
    """
    state.loan.read = True  # the other form may refer to the arrays
    loan = ShownLoan(state.loan, show(state.loan.step_state))
    shown: State[Any] = make(State, {**state.__dict__, "loan": loan})
    return shown


def _known_metrics(metrics: object) -> LazyDict:
    if not isinstance(metrics, Mapping):
        raise ArgumentTypeError(
            f"State.metrics must be a dict of names and values, got {metrics!r}",
            fix="use state.replace(metrics={**state.metrics, 'name': value})",
        )
    known = LazyDict(lambda: metrics)
    known.get()
    return known


_PUBLIC = (
    *(f.name for f in dataclasses.fields(State) if not f.metadata["internal"]),
    "event_counts",
    "history",
    "metrics",
    "step_state",
    "times",
)


def fields_by_change(on_change: OnChange) -> tuple[str, ...]:
    """Returns the fields of `State` whose changes the engine treats as ``on_change`` says."""
    return tuple(f.name for f in dataclasses.fields(State) if f.metadata["on_change"] == on_change)


def saved_fields(format: int | None = None) -> dict[str, str]:
    """Returns ``{key in a checkpoint's record: field of State}``, for a format or for all."""
    return {
        f.metadata["saved_as"] or f.name: f.name
        for f in dataclasses.fields(State)
        if f.metadata["saved"] and (format is None or f.metadata["added_in"] <= format)
    }


STATE_ONLY = tuple(
    f.name for f in dataclasses.fields(State) if f not in dataclasses.fields(Snapshot)
)
"""The fields that a `State` has and a `Snapshot` does not."""
