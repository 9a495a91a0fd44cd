"""A loop as data, and the attachments that extend it.

    spec = LoopSpec(step_fn).attach(Handler(as_events("started"), ALWAYS, "greet", greet))
    spec = spec.replace(start=state)

Everything here is frozen data and protocols. The engine reads a spec, handlers add to it, and
`Loop` is a spec with methods. To write your own handler package, you need only these types.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

from jaxloop._core.dry import DryRun
from jaxloop._core.events import Event, StatusLike
from jaxloop._core.filters import Filter
from jaxloop._core.state import Snapshot, State
from jaxloop._core.store import Store
from jaxloop._core.types import BatchFn, Better, OutputT, PyTree, S
from jaxloop._program.cache import ProgramCache
from jaxloop.errors import ArgumentError
from jaxloop.metrics.declare import MetricSpec
from jaxloop.metrics.names import names_of_value

HandlerResult: TypeAlias = tuple[StatusLike, State[S]] | None
"""The result of a handler: None to change nothing, or ``(status, state)``."""

HandlerFn: TypeAlias = Callable[[State[Any]], HandlerResult[Any]]
"""A function that may read and change the state, and halt the loop."""

ObserverFn: TypeAlias = Callable[[Snapshot], object]
"""A function that reads a snapshot and changes nothing. Its result is ignored."""

CheckFn: TypeAlias = "Callable[[LoopSpec[Any, Any]], None]"
"""A check that runs before the first step and raises if it finds a mistake."""


AddsFn: TypeAlias = "Callable[[LoopSpec[Any, Any]], Mapping[str, Better | None] | None]"
"""Returns the metrics that a handler adds to a loop, and which values of each are better.

None means that it may add any.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class RunStart:
    """What is known right before the first step of a run.

    Attributes:
        loop: The loop that runs, with everything that is attached to it.
        snapshot: The counters.
        step_state: The step state, with a `jax.ShapeDtypeStruct` in place of each array.
        metrics: The values of the loop's metrics, with a `jax.ShapeDtypeStruct` in place of each
            array. Metrics that handlers add are not known yet.
        data: What the run iterates over in this epoch: the data that were passed to `run`, or what
            a function ``epoch -> iterable`` returned.
        sample: The next batch of the data. None if the data of this epoch are at their end.
        better: Which values are better of the metrics that the loop has or that handlers add, as
            far as their names are known. None means that this is unknown.
        nested: Whether the run is inside another run, in the main thread.
        max_time_s: The seconds after which the run ends, or None.
        run_id: A text that is the same for a run and for what resumes it.
        shared: A dict that is new for each run. Attachments that work together share in it what
            they need, by a key of their own.
    """

    loop: LoopSpec[Any, Any]
    snapshot: Snapshot
    step_state: PyTree
    metrics: Mapping[str, PyTree]
    data: Any
    sample: PyTree
    better: Mapping[str, Better | None] = dataclasses.field(default_factory=dict)
    nested: bool = False
    max_time_s: float | None = None
    run_id: str = ""
    shared: dict[object, Any] = dataclasses.field(default_factory=dict)

    def better_of(self, metric: str) -> Better | None:
        """Returns which values of a metric are better, or None if this is unknown.

        The value of one of several outputs, such as ``accuracy/head``, is like the metric.
        """
        names = names_of_value(metric)
        return next((self.better[name] for name in names if name in self.better), None)


OpenFn: TypeAlias = Callable[[RunStart], HandlerFn]
"""Makes the function that a handler calls in one run, and raises if it finds a mistake."""

InDryRun: TypeAlias = "Callable[[Any, DryRun], Attachment | None]"
"""Returns what takes the place of an attachment in a dry run. None leaves it out."""

DecideFn: TypeAlias = Callable[[State[Any]], State[Any] | None]
"""Returns None to save nothing, or the state to save."""


@dataclasses.dataclass(frozen=True)
class Attachment:
    """The base class of all attachments.

    Attributes:
        events: The events at which it runs.
        filter: Selects the firings at which it runs.
        name: Its name in messages and in ``halted_by``.
        writes_to: The path or the address that it writes to, for the summary of a run, or None.
        in_dry_run: Returns what takes its place in a dry run, or None to leave it out. By default,
            a dry run runs the attachment itself. It leaves out a `CheckpointTrigger`.
    """

    kind: ClassVar[str] = "attachment"
    """What a report calls it."""

    events: tuple[Event, ...]
    filter: Filter
    name: str
    writes_to: str | None = dataclasses.field(default=None, kw_only=True)
    in_dry_run: InDryRun | None = dataclasses.field(default=None, compare=False, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Handler(Attachment):
    """A function that runs at events and may change the state and halt the loop.

    Attributes:
        fn: The function.
        watches: Metrics that it reads. At a firing at which one has no value yet, because the
            handler that adds it has not run in this epoch, it does not run. A metric that can
            never exist is an error before the first step.
        adds: The names of the metrics that it adds, or a function of the loop that returns them.
            None means that it may add any.
        check: Called with the loop before the first step.
        open: Called once per run, right before the first step, with what is known then. It returns
            the function to call in this run in place of ``fn``. If that has the method of
            `ClosedObserver`, the run calls it.
        unique: Whether no other attachment may have its name, because the name is the key of its
            memory in ``state.handler_state``.
        auto_mode: Whether it asks the metrics that it watches which of their values are better. If
            this is unknown, a run warns before the first step.
        validates: Whether its time counts as that of a validation.
        traces: Whether it records a profile, for which the run names what it does.
    """

    kind = "handler"

    fn: HandlerFn
    watches: tuple[str, ...] = ()
    adds: tuple[str, ...] | AddsFn | None = None
    check: CheckFn | None = None
    # Not compared: it is often a method of ``fn``, and methods of equal objects are not equal.
    open: OpenFn | None = dataclasses.field(default=None, compare=False)
    unique: bool = False
    auto_mode: bool = False
    validates: bool = False
    traces: bool = False

    def added(self, loop: LoopSpec[Any, Any]) -> Mapping[str, Better | None] | None:
        """Returns the metrics that it adds to a loop, and which values of each are better.

        None means that it may add any metric. A value of None means that this is unknown.
        """
        if self.adds is None or callable(self.adds):
            return None if self.adds is None else self.adds(loop)
        return dict.fromkeys(self.adds)


@dataclasses.dataclass(frozen=True)
class Observer(Attachment):
    """A function that runs after the handlers of a firing and changes nothing.

    Attributes:
        fn: The function.
        close: Called once when the run ends, with or without an error.
        check: Called with the loop before the first step.
        open: Called once per run, right before the first event, when nothing but the data and the
            step can fail any more. It returns the function to call in this run in place of ``fn``,
            or None if it has nothing to see in this run. If that has the method of
            `SyncedObserver`, `FailingObserver` or `ClosedObserver`, the run calls it.
    """

    kind = "observer"

    fn: ObserverFn
    close: Callable[[], None] | None = None
    check: CheckFn | None = None
    open: Callable[[RunStart], ObserverFn | None] | None = dataclasses.field(
        default=None, compare=False
    )


@dataclasses.dataclass(frozen=True)
class CheckpointTrigger(Attachment):
    """A trigger that runs among the handlers and decides whether to save when the firing ends.

    Attributes:
        decide: Returns None to save nothing. Otherwise it returns the state, with any memory that
            it keeps in ``handler_state``.
        open_store: Opens the store for the states. Called once per run with the stores that the
            run has opened so far, because two triggers may save to the same place.
        value: Returns the value by which a state is the best so far, or None if it is not.
        watches: See `Handler`.
        check: Called with the loop before the first step.
        check_state: Called with the first state before the first step.
        open: Like that of a `Handler`, for ``decide``.
        unique: See `Handler`.
        auto_mode: See `Handler`.
    """

    kind = "checkpoint"

    decide: DecideFn
    open_store: Callable[[Sequence[Store]], Store]
    value: Callable[[State[Any]], float | None] = lambda state: None
    watches: tuple[str, ...] = ()
    check: CheckFn | None = None
    check_state: Callable[[State[Any]], None] | None = None
    open: Callable[[RunStart], DecideFn] | None = dataclasses.field(default=None, compare=False)
    unique: bool = False
    auto_mode: bool = False


class GuardAction(enum.Enum):
    """The action to take if a guard finds a problem."""

    HALT = "halt"
    REWIND = "rewind"
    """The run returns to the newest checkpoint. Without one, it halts."""


@dataclasses.dataclass(frozen=True)
class Guard(Attachment):
    """A check of whether a state is good. Each guard also runs before a state is saved.

    Attributes:
        inspect: Returns a description of what is wrong with a state, or None.
        action: The action to take if ``inspect`` finds a problem.
        check: Called with the loop before the first step.
        unique: See `Handler`.
    """

    kind = "guard"

    inspect: Callable[[State[Any]], str | None]
    action: GuardAction = GuardAction.HALT
    check: CheckFn | None = None
    unique: bool = False


Acting: TypeAlias = Handler | CheckpointTrigger | Guard
"""Attachments that may change a run. A block ends where one of them runs."""


@runtime_checkable
class PreparedInit(Protocol):
    """An init function in three parts, of which only ``fn`` is compiled.

    A loop takes any ``init_fn(batch, init_state)``. If it has these three parts, a run calls them
    in this order: ``prepare``, ``fn``, ``check``.
    """

    @property
    def fn(self) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
        """``(batch, prepared) -> (step_state, evidence)``, a pure function."""

    def prepare(self, init_state: Any) -> PyTree:
        """Converts the ``init_state`` passed to `run` to arrays that `jax.jit` accepts."""

    def check(self, evidence: PyTree) -> None:
        """Raises if the evidence, which ``fn`` computed from the first batch, shows a mistake."""


class Task(Protocol):
    """The way to evaluate the model of a supervised loop.

    Attributes:
        loss: The loss, or None.
    """

    @property
    def loss(self) -> Any:
        """The loss, or None."""

    @property
    def training_only(self) -> Collection[str]:
        """The names that the step of the training reports, and that of an evaluation does not."""

    @property
    def trains(self) -> bool:
        """Whether it is the task of a trainer, which has an optimizer."""

    @property
    def learning_rate(self) -> float | None:
        """The rate of an optimizer that was given by its name, or None."""

    def statics(self) -> Mapping[str, str]:
        """Returns what the model is made of besides its arrays; see `State.statics`."""

    def check_data(self, data: Any, reported: Collection[str]) -> None:
        """Raises if a step that reports these names counts padding in ``data`` as examples."""

    def eval_state(self, step_state: PyTree) -> PyTree:
        """Returns the step state of the evaluation, made from that of the training.

        Raises:
            ArgumentTypeError: The step state has no model.
        """

    def eval_steps(self, model: Any) -> tuple[BatchFn, BatchFn]:
        """Returns the init and step functions that evaluate ``model``, or the task's own model."""


SpecT = TypeVar("SpecT", bound="LoopSpec[Any, Any]")
"""A loop of any kind: a handler takes one and returns one of the same kind."""


@dataclasses.dataclass(frozen=True, repr=False)
class LoopSpec(Generic[S, OutputT]):
    """A training loop as frozen data.

    Attributes:
        step_fn: ``step_fn(batch, step_state)`` returns the next step state, or an emission.
        init_fn: ``init_fn(batch, init_state)`` makes the first step state. If None, you pass the
            first step state to `run`.
        output_transform: Makes the output of a run from the final state. If None, the output is
            the state itself.
        show: Makes what ``step_state`` of a returned state is from what is carried. If None, it is
            what is carried. Handlers see that in any case.
        attachments: The attachments, in order.
        metrics: The declared metrics.
        start: The state to start from, or None.
        resume_path: The folder to resume from, or None.
        best_from: The name of the handler whose memory holds the best step state, for the output.
        task: The way to evaluate the model of a supervised loop, or None.
        programs: The programs compiled for this step and these metrics.
    """

    step_fn: BatchFn
    init_fn: BatchFn | None = None
    output_transform: Callable[[State[S]], OutputT] | None = None
    show: Callable[[PyTree], Any] | None = None
    attachments: tuple[Attachment, ...] = ()
    metrics: tuple[MetricSpec, ...] = ()
    start: State[S] | None = None
    resume_path: str | None = None
    best_from: str | None = None
    task: Task | None = None
    programs: ProgramCache = dataclasses.field(default_factory=ProgramCache, compare=False)

    def attach(self: SpecT, attachment: Attachment) -> SpecT:
        """Returns a loop with one more attachment.

        Raises:
            ArgumentError: Another attachment with a memory has the same name.
        """
        if getattr(attachment, "unique", False) and any(
            getattr(other, "unique", False) and other.name == attachment.name
            for other in self.attachments
        ):
            raise ArgumentError(
                f"two handlers of this loop are named {attachment.name!r} and would share a memory",
                fix="give one of them another name=",
            )
        return self.replace(attachments=(*self.attachments, attachment))

    def replace(self: SpecT, **changes: Any) -> SpecT:
        """Returns a loop with changed attributes. Changing the step or the metrics recompiles."""
        if "step_fn" in changes or "metrics" in changes:
            changes.setdefault("programs", ProgramCache())
        return dataclasses.replace(self, **changes)

    def acting(self) -> list[Acting]:
        """Returns the attachments that may change what a run does."""
        return [one for one in self.attachments if isinstance(one, Acting)]

    def triggers(self) -> list[CheckpointTrigger]:
        """Returns the checkpoint triggers."""
        return [one for one in self.attachments if isinstance(one, CheckpointTrigger)]
