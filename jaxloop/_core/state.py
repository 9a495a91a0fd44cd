"""State, Snapshot and emit: what a run knows of itself, as frozen values.

    def show(state):
        print(state.epoch, state.metrics["loss"])      # computed here, because it is read here

    def step(batch, params):
        ...
        return emit(new_params, loss=loss)             # `loss` is reported, not carried

`State.metrics` and `State.step_state` are read through cells: what nobody reads is never computed,
fetched or copied, and the driver knows what was read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxloop._core.events import NEXT_EPOCH, Event
from jaxloop._core.lazy import Lazy, ReadOnlyDict, Records
from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentTypeError, unknown_name


class Cell:
    """Where a state's device values are, and whether anyone has looked.

    The driver donates what is in a cell when nobody read it and nobody can; else it copies first.
    """

    __slots__ = ("accumulators", "read", "step_state")

    def __init__(self, step_state: PyTree, accumulators: PyTree) -> None:
        self.step_state = step_state
        self.accumulators = accumulators
        self.read = False


class _Readings:
    """What a `State` and a `Snapshot` know lazily: it is found out when it is read."""

    _metrics: Lazy
    _history: Records
    _times: Records

    @property
    def metrics(self) -> Mapping[str, Any]:
        """``{name: value}`` of this epoch so far, as NumPy values on the host."""
        return self._metrics.get()

    @property
    def history(self) -> Mapping[int, Mapping[str, Any]]:
        """``{epoch: metrics}`` of finished and halted epochs, as NumPy values on the host."""
        return self._history.get()

    @property
    def times(self) -> Mapping[int, float]:
        """``{epoch: seconds}``; each is an `EpochTime`, which says where they went."""
        return self._times.get()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class State(_Readings):
    """Everything that a run knows; frozen, and alone enough to go on from.

    Attributes:
        epoch: The epoch that is going on, from 0.
        max_epoch: The total of epochs, or None.
        iteration: The iteration that is going on, from 0 in each epoch.
        max_iteration: Iterations of an epoch, or None while unknown.
        step: Iterations completed since the start.
        history: ``{epoch: metrics}`` of finished and halted epochs.
        times: ``{epoch: seconds}``.
        outputs: What the last step reported with `emit`.
        event_counts: ``{event: (total, within the epoch)}``.
        handler_state: ``{name: pytree}``, what monitors remember.
        status: "running", "completed", "halted" or "interrupted".
        halted_by: The name of the handler that halted the loop, else None.
        event: The event that is firing.

    Example:
        >>> import jaxloop as jl
        >>> state = jl.loop(lambda batch, total: total + batch).run([1, 2, 3], init_state=0)
        >>> int(state.step_state), state.step, state.status
        (6, 3, 'completed')
    """

    epoch: int = 0
    max_epoch: int | None = None
    iteration: int = 0
    max_iteration: int | None = None
    step: int = 0
    outputs: PyTree = dataclasses.field(default_factory=dict)
    event_counts: Mapping[Event, tuple[int, int]] = dataclasses.field(
        default_factory=lambda: ReadOnlyDict({event: (0, 0) for event in Event})
    )
    handler_state: Mapping[str, PyTree] = dataclasses.field(default_factory=ReadOnlyDict)
    status: str = "running"
    halted_by: str | None = None
    event: Event | None = None
    # Out of sight: the metrics and the carried values, where the walk goes on, where it is in the
    # data (a `jaxloop.positions.Position`), and the seconds that this epoch has taken so far.
    _metrics: Lazy = dataclasses.field(default_factory=lambda: Lazy(dict))
    _history: Records = dataclasses.field(default_factory=Records)
    _times: Records = dataclasses.field(default_factory=Records)
    _cell: Cell = dataclasses.field(default_factory=lambda: Cell({}, {}))
    _next: str = NEXT_EPOCH
    _position: Any = None
    _elapsed_s: float = 0.0

    @property
    def step_state(self) -> PyTree:
        """What the step carries, a pytree of arrays; it stays valid for as long as it is kept."""
        self._cell.read = True
        return self._cell.step_state

    def replace(self, **changes: Any) -> State:
        """A copy with ``changes``, which name attributes of the state.

        Raises:
            UnknownNameError: A name that is no attribute of a `State`.

        Example:
            >>> State(epoch=1).replace(metrics={"loss": 2.0}).metrics
            {'loss': 2.0}
        """
        for name in changes:
            if name not in _PUBLIC:
                raise unknown_name("attribute of State", name, _PUBLIC)
        for name in ("event_counts", "handler_state"):
            if name in changes:
                changes[name] = ReadOnlyDict(changes[name])
        for name in ("history", "times"):
            if name in changes:
                changes[f"_{name}"] = Records.known(changes.pop(name))
        if "metrics" in changes:
            metrics = changes.pop("metrics")
            if not isinstance(metrics, Mapping):
                raise ArgumentTypeError(
                    f"State.metrics must be a dict of names and values, and got {metrics!r}"
                )
            changes["_metrics"] = Lazy(lambda: metrics)
            changes["_metrics"].get()
        if "step_state" in changes:
            changes["_cell"] = Cell(changes.pop("step_state"), self._cell.accumulators)
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        of = "" if self.max_epoch is None else f"/{self.max_epoch}"
        return (
            f"State({self.status}, epoch {self.epoch}{of}, iteration {self.iteration}, "
            f"step {self.step}"
            + (f", event {self.event.value}" if self.event is not None else "")
            + (f", halted by {self.halted_by}" if self.halted_by else "")
            + ")"
        )


_PUBLIC = (
    *(f.name for f in dataclasses.fields(State) if not f.name.startswith("_")),
    "history",
    "metrics",
    "step_state",
    "times",
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Snapshot(_Readings):
    """What an observer sees of one firing: counters and host values, no ``step_state``.

    The attributes mean what they mean in `State`.

    Example:
        >>> Snapshot(epoch=0, iteration=2, step=3).step
        3
    """

    epoch: int = 0
    max_epoch: int | None = None
    iteration: int = 0
    max_iteration: int | None = None
    step: int = 0
    status: str = "running"
    halted_by: str | None = None
    event: Event | None = None
    _metrics: Lazy = dataclasses.field(default_factory=lambda: Lazy(dict), repr=False)
    _history: Records = dataclasses.field(default_factory=Records, repr=False)
    _times: Records = dataclasses.field(default_factory=Records, repr=False)
    _counts: tuple[Mapping[Event, tuple[int, int]], int, int] = dataclasses.field(
        default=({}, 0, 0), repr=False
    )
    """Firings as they were counted last, and how many iterations started and completed since."""

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Snapshot:
        """A snapshot of all its fields, which becomes their owner; quick, as many are made."""
        snapshot = object.__new__(cls)
        snapshot.__dict__.update(fields)
        return snapshot

    @property
    def event_counts(self) -> Mapping[Event, tuple[int, int]]:
        """``{event: (total, within the epoch)}``; the firing that is going on is counted."""
        counts, started, completed = self._counts
        counted = dict(counts)
        for event, by in (
            (Event.ITERATION_STARTED, started),
            (Event.ITERATION_COMPLETED, completed),
        ):
            if by:
                total, epoch = counted[event]
                counted[event] = (total + by, epoch + by)
        return ReadOnlyDict(counted)


class EpochTime(float):
    """The seconds of an epoch, and where they went; a float like any other.

    Args:
        elapsed_s: All of them.
        data_s: Waiting for data.
        dispatch_s: Handing blocks to the device.
        handlers_s: In handlers and observers, and saving.

    Example:
        >>> time = EpochTime(2.0, data_s=0.5, dispatch_s=0.25, handlers_s=0.25)
        >>> time, time.device_s
        (2.0, 1.0)
    """

    data_s: float
    dispatch_s: float
    handlers_s: float

    def __new__(
        cls,
        elapsed_s: float,
        data_s: float = 0.0,
        dispatch_s: float = 0.0,
        handlers_s: float = 0.0,
    ) -> EpochTime:
        """See the class."""
        time = super().__new__(cls, elapsed_s)
        time.data_s, time.dispatch_s, time.handlers_s = data_s, dispatch_s, handlers_s
        return time

    @classmethod
    def of(cls, seconds: float) -> EpochTime:
        """Seconds as they are; of a plain number, where they went is not known."""
        return seconds if isinstance(seconds, cls) else cls(seconds)

    @property
    def device_s(self) -> float:
        """The rest: the device was working, and the driver waited for it or had nothing to do."""
        return max(0.0, float(self) - self.data_s - self.dispatch_s - self.handlers_s)

    @property
    def parts(self) -> tuple[float, float, float, float]:
        """What it was made from."""
        return float(self), self.data_s, self.dispatch_s, self.handlers_s
