"""The loop, a frozen value, and its thin builder methods.

    import jaxloop as jl

    loop = jl.loop(step_fn).handle("epoch_completed", show, jl.every(2)).metric("accuracy")
    state = loop.run(data, epochs=3)

Every builder method returns a new `Loop` and changes nothing. What a method does lives in
`jaxloop.handlers` and `jaxloop.driver`, imported when it is called, so that arrows point down.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

from jaxloop._core.checks import check_callable, name_of
from jaxloop._core.events import Event, as_events
from jaxloop._core.filters import as_filter
from jaxloop._core.state import Snapshot, State
from jaxloop._core.types import PyTree
from jaxloop._program.cache import Programs
from jaxloop._spec import Attachment, EventLike, FilterLike, Handler
from jaxloop.errors import ArgumentError, ArgumentTypeError
from jaxloop.metrics.declare import (
    AccumulateLike,
    FieldsLike,
    MetricLike,
    MetricSpec,
    declare,
)

if TYPE_CHECKING:
    from jaxloop._engine.report import Report
    from jaxloop._supervised.task import SupervisedTask


@dataclasses.dataclass(frozen=True, repr=False)
class Loop:
    """A training loop as a value; made by `jaxloop.loop`, `trainer` and `evaluator`.

    Example:
        >>> import jaxloop as jl
        >>> loop = jl.loop(lambda batch, total: total + batch)
        >>> int(loop.run([1, 2, 3], init_state=0, epochs=2).step_state)
        12
    """

    step_fn: Callable[[PyTree, PyTree], PyTree]
    init_fn: Callable[[PyTree, PyTree], PyTree] | None = None
    output_transform: Callable[[State], Any] | None = None
    attachments: tuple[Attachment, ...] = ()
    metrics: tuple[MetricSpec, ...] = ()
    start: State | None = None
    resume_path: str | None = None
    best_of: str | None = None
    supervised: SupervisedTask | None = None
    """For `validate`: what knows the model and the loss; None for a loop of one's own step."""
    _programs: Programs = dataclasses.field(default_factory=Programs, compare=False)

    # --- attaching -----------------------------------------------------------------------------

    def attach(self, attachment: Attachment) -> Loop:
        """A loop with one more attachment; what every built-in handler is made with."""
        if attachment.reserved and any(
            other.reserved and other.name == attachment.name for other in self.attachments
        ):
            raise ArgumentError(
                f"two handlers of one loop are named {attachment.name!r}, and would share a memory",
                fix="give one of them another name=",
            )
        return dataclasses.replace(self, attachments=(*self.attachments, attachment))

    def handle(
        self,
        event: EventLike,
        handler: Handler,
        filter: FilterLike = "always",
        *,
        name: str | None = None,
    ) -> Loop:
        """Runs ``handler(state)`` when ``event`` fires.

        Args:
            event: An event, its name, a list of them, or "all".
            handler: Gets the `State`, returns None or ``(status, state)``.
            filter: At which firings: "always", "once", ``jl.every(n)``, a dict, or a function
                ``state -> bool``, which is asked at every firing and so costs fusion.
            name: What errors and ``halted_by`` call it; by default the function's name.

        Raises:
            UnknownNameError: The event or the filter is unknown.
            ArgumentTypeError: ``handler`` cannot be called.

        Example:
            >>> import jaxloop as jl
            >>> stop = lambda state: ("halt_loop", state)
            >>> loop = jl.loop(lambda b, s: s + b).handle("iteration_completed", stop, jl.only(2))
            >>> loop.run([1, 1, 1], init_state=0).step
            2
        """
        return self.attach(
            Attachment(
                as_events(event),
                check_callable("handle", "handler", handler),
                as_filter(filter),
                name or name_of(handler),
            )
        )

    def observe(
        self,
        event: EventLike,
        observer: Callable[[Snapshot], None],
        filter: FilterLike = "always",
        *,
        name: str | None = None,
    ) -> Loop:
        """Runs ``observer(snapshot)`` when ``event`` fires; it only looks, and costs no fusion.

        Args:
            event: As for `handle`.
            observer: Gets a `Snapshot`; what it returns is not looked at.
            filter: As for `handle`; a function gets the snapshot.
            name: What errors call it.

        Example:
            >>> import jaxloop as jl
            >>> seen = []
            >>> loop = jl.loop(lambda b, s: s + b).observe("all", lambda s: seen.append(s.step))
            >>> _ = loop.run([1, 1], init_state=0)
            >>> seen
            [0, 0, 0, 1, 1, 2, 2, 2]
        """
        return self.attach(
            Attachment(
                as_events(event),
                check_callable("observe", "observer", observer),
                as_filter(filter),
                name or name_of(observer),
                kind="observer",
                adds=(),
            )
        )

    def metric(
        self,
        metric: MetricLike,
        name: str | None = None,
        accumulate: AccumulateLike = None,
        transform_or_fields: FieldsLike = ("y_true", "y_pred"),
    ) -> Loop:
        """Accumulates a metric over each epoch, exactly, on the device.

        Args:
            metric: A built-in's name, a `Metric`, a function of the extracted values, or a class
                with the CLU protocol.
            name: Its key in ``state.metrics``.
            accumulate: None for the metric's own, or "running_average", "running_sum",
                "running_min", "running_max", "last", or ``(acc, obs, i) -> acc``.
            transform_or_fields: Names looked up in what the step reports, then in its state; or a
                function of both merged that returns the list of arguments.

        Raises:
            UnknownNameError: The metric or the accumulator is unknown.

        Example:
            >>> import jaxloop as jl
            >>> step = lambda batch, state: jl.emit(state, x=batch)
            >>> loop = jl.loop(step).metric(lambda x: x, "mean", None, ["x"])
            >>> float(loop.run([1.0, 2.0, 3.0]).history[0]["mean"])
            2.0
        """
        declared = declare(metric, name, accumulate, transform_or_fields)
        kept = tuple(one for one in self.metrics if one.name != declared.name)
        if len(kept) != len(self.metrics):
            warnings.warn(
                f"metric {declared.name!r} was declared twice; the last declaration wins",
                stacklevel=2,
            )
        return dataclasses.replace(self, metrics=(*kept, declared), _programs=Programs())

    def log(
        self,
        message_fn: Callable[[Snapshot], str],
        *,
        event: EventLike = "iteration_completed",
        filter: FilterLike = "always",
        file: IO[str] | None = None,
    ) -> Loop:
        """Writes ``message_fn(snapshot)`` as a line, as an observer.

        Args:
            message_fn: Makes the line.
            event: As for `handle`.
            filter: As for `observe`.
            file: Where to; by default standard output.

        Example:
            >>> import jaxloop as jl
            >>> line = lambda s: f"epoch {s.epoch}"
            >>> loop = jl.loop(lambda b, s: s).log(line, event="epoch_completed")
            >>> _ = loop.run([1], epochs=2)
            epoch 0
            epoch 1
        """
        from jaxloop.handlers.log import line_writer

        fn = line_writer(check_callable("log", "message_fn", message_fn), file)
        return self.observe(event, fn, filter, name="log")

    def validate(
        self,
        data: Any,
        *,
        model: Any = None,
        event: EventLike = "epoch_completed",
        filter: FilterLike = "always",
        prefix: str = "validation_",
    ) -> Loop:
        """Evaluates the metrics attached before it on ``data`` and adds them to the metrics.

        Args:
            data: A re-iterable of supervised batches, or a function ``epoch -> iterable``.
            model: The model; by default the trainer's.
            event: As for `handle`.
            filter: As for `handle`.
            prefix: What the names of the metrics get in front.

        Raises:
            ArgumentError: There is no model, or no metric was attached before.
        """
        from jaxloop.handlers.validate import attach_validate

        return attach_validate(self, data, model, event, filter, prefix)

    def monitor(
        self,
        metric: str,
        handler: Handler,
        *,
        name: str,
        mode: str | Callable[[Any, Any], bool] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        event: EventLike = "epoch_completed",
        filter: FilterLike = "always",
    ) -> Loop:
        """Calls ``handler`` at the ``patience``-th event in a row without an improvement.

        Args:
            metric: The metric to watch.
            handler: As for `handle`; afterwards counting starts anew, and the best value stays.
            name: Its key in ``state.handler_state``.
            mode: "min", "max", or a function ``(new, best) -> bool``.
            patience: Events in a row, at least 1.
            min_delta: An improvement is better by strictly more than this.
            event: As for `handle`.
            filter: As for `handle`.
        """
        from jaxloop.handlers.monitor import attach_monitor

        return attach_monitor(self, metric, handler, name, mode, patience, min_delta, event, filter)

    def early_stop(
        self,
        metric: str,
        *,
        mode: str | Callable[[Any, Any], bool] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        restore_best: bool = False,
        event: EventLike = "epoch_completed",
        filter: FilterLike = "always",
        name: str | None = None,
    ) -> Loop:
        """Halts the loop when ``metric`` has not improved ``patience`` times in a row.

        Args:
            metric: The metric to watch.
            mode: As for `monitor`.
            patience: As for `monitor`.
            min_delta: As for `monitor`.
            restore_best: Whether the output of `run` is made from the step state of the best
                event; what is saved stays the last.
            event: As for `handle`.
            filter: As for `handle`.
            name: By default one made of the metric.
        """
        from jaxloop.handlers.monitor import attach_early_stop

        return attach_early_stop(
            self, metric, mode, patience, min_delta, restore_best, event, filter, name
        )

    def reduce_lr_on_plateau(
        self,
        metric: str,
        *,
        factor: float = 0.1,
        mode: str | Callable[[Any, Any], bool] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        min_scale: float = 0.0,
        cooldown: int = 0,
        event: EventLike = "epoch_completed",
        filter: FilterLike = "always",
        name: str | None = None,
    ) -> Loop:
        """Scales the learning rate by ``factor`` when ``metric`` has stopped improving.

        Args:
            metric: The metric to watch.
            factor: What the scale is multiplied by, between 0 and 1.
            mode: As for `monitor`.
            patience: As for `monitor`.
            min_delta: As for `monitor`.
            min_scale: The scale goes no lower.
            cooldown: Events after a reduction that are not counted.
            event: As for `handle`.
            filter: As for `handle`.
            name: By default one made of the metric.
        """
        from jaxloop.handlers.monitor import attach_reduce_lr

        return attach_reduce_lr(
            self,
            metric,
            factor,
            mode,
            patience,
            min_delta,
            min_scale,
            cooldown,
            event,
            filter,
            name,
        )

    def checkpoint(
        self,
        path: str = "checkpoint",
        *,
        event: EventLike = "epoch_completed",
        filter: FilterLike = "always",
        criteria: str | None = None,
        mode: str | Callable[[Any, Any], bool] = "min",
        keep: int | None = 3,
        keep_best: int = 1,
        keep_every: int | None = None,
        on_exception: bool = False,
        file_pattern: Callable[[State], str] | None = None,
    ) -> Loop:
        """Saves the whole `State` with Orbax, at the end of the firing, and how the run ended.

        It is written in the background, in a folder that has its name only when it is complete; a
        save that failed raises at the next block or at the end. The run does not end before the
        last one is on disk. A run with a checkpoint also ends well on SIGTERM and Ctrl-C: it saves,
        its status is "interrupted", and `resume` goes on from there.

        Args:
            path: The folder.
            event: As for `handle`.
            filter: As for `handle`.
            criteria: A metric; only when it is the best so far is anything saved.
            mode: As for `monitor`.
            keep: How many of the newest are kept; None: all.
            keep_best: How many of the best, by ``criteria``, are kept beside them.
            keep_every: Those whose step is a multiple of it are kept too.
            on_exception: Whether the last good state is saved when an exception ends the run.
            file_pattern: Names the folder of a checkpoint; by default the step's number.

        Raises:
            CheckpointError: From `run`: the folder cannot be written; what was there is untouched.
            DataError: From `run`: the data are a one-shot iterator without a state of its own.
        """
        from jaxloop.handlers.checkpoint import Saver, attach_checkpoint

        saver = Saver(path, criteria, mode, keep, keep_best, keep_every, on_exception, file_pattern)
        return attach_checkpoint(self, saver, event, filter)

    def nan_guard(
        self,
        action: str = "halt",
        *,
        event: EventLike = "iteration_completed",
        filter: FilterLike = {"every": 100},  # noqa: B006  it is only read
        name: str = "nan_guard",
    ) -> Loop:
        """Looks after NaN and infinity in the step state; see what to do about them.

        "halt" and "rewind" look when ``filter`` says so, at the end of each epoch, and before
        anything is saved: a state that is not finite is never saved. "skip" looks at every step,
        inside the compiled block and without waiting for it.

        Args:
            action: "halt" ends the loop, with ``halted_by`` the guard's name. "skip" leaves the
                state and the metrics unchanged by a step that made a number of the state, or a
                reported ``loss``, infinite or NaN; the metric ``skipped_steps`` counts them.
                "rewind" goes back to the state of the newest good checkpoint, with its metrics
                and what handlers remembered then, and goes on with the data that follow: the
                stretch in between is stepped over. Without a checkpoint so far it halts.
            event: As for `handle`; not used by "skip".
            filter: As for `handle`; not used by "skip".
            name: What ``halted_by`` says.

        Raises:
            UnknownNameError: The action is unknown.
            ArgumentError: From `run`: "rewind" without a `checkpoint`.

        Example:
            >>> import jaxloop as jl
            >>> loop = jl.loop(lambda b, s: s / b).nan_guard("skip")
            >>> state = loop.run([2.0, 0.0, 4.0], init_state=8.0)
            >>> float(state.step_state), int(state.metrics["skipped_steps"])
            (1.0, 1)
        """
        from jaxloop.handlers.nan_guard import attach_nan_guard

        return attach_nan_guard(self, action, event, filter, name)

    def from_state(self, state: State) -> Loop:
        """Goes on from ``state``, also from a halted one; it wins over the init function.

        Example:
            >>> import jaxloop as jl
            >>> loop = jl.loop(lambda b, s: s + b)
            >>> first = loop.run([1, 2], init_state=0)
            >>> int(loop.from_state(first).run([1, 2], epochs=2).step_state)
            6
        """
        if not isinstance(state, State):
            raise ArgumentTypeError(
                f"from_state needs a jl.State, and got {type(state).__name__}",
                fix="to start from a step state alone, pass it to run as init_state",
            )
        return dataclasses.replace(self, start=state)

    def resume(self, path: str = "checkpoint") -> Loop:
        """Goes on from the newest good checkpoint in ``path``, or starts fresh if there is none."""
        return dataclasses.replace(self, resume_path=str(path))

    # --- running -------------------------------------------------------------------------------

    def run(
        self,
        data: Any,
        init_state: PyTree = None,
        *,
        epochs: int = 1,
        iterations: int | None = None,
        jit: bool | Mapping[str, Any] = True,
        fuse: int | str = "auto",
        strict: bool = False,
        debug: bool = False,
        output_transform: Callable[[State], Any] | None = None,
    ) -> Any:
        """Runs the loop to its end.

        Args:
            data: Batches: an iterable, a function ``epoch -> iterable``, a one-shot iterator, or
                None together with ``iterations``.
            init_state: What the init function gets, or without one the first step state.
            epochs: The total of epochs, also of a loop that goes on.
            iterations: The most iterations of an epoch.
            jit: False runs op by op; a dict passes options to `jax.jit`.
            fuse: Iterations that a compiled block may hold; 1 never fuses, "auto" decides from
                the step and the platform.
            strict: Whether a recompilation in mid-run is an error.
            debug: Whether events, handlers and times are traced through `logging`.
            output_transform: Makes the output from the final `State`; it wins over the loop's.

        Returns:
            What the output transform makes of the final `State`; the `State` itself without one.

        Raises:
            JaxloopError: Whatever is known to be wrong before the first step.

        Example:
            >>> import jaxloop as jl
            >>> jl.loop(lambda b, s: s + b).run([1.5, 2.5], init_state=0.0).step_state.item()
            4.0
        """
        from jaxloop._engine.run import Run

        run = Run(self, data, init_state, epochs, iterations, jit, fuse, strict, debug)
        run.finish()
        return run.output(output_transform)

    def stream(
        self,
        data: Any,
        init_state: PyTree = None,
        *,
        epochs: int = 1,
        iterations: int | None = None,
        jit: bool | Mapping[str, Any] = True,
        fuse: int | str = "auto",
        strict: bool = False,
        debug: bool = False,
        output_transform: Callable[[State], Any] | None = None,
    ) -> Iterator[Any]:
        """Runs the loop one epoch at a time: an iterator of `State`, one an epoch.

        Arguments as for `run`; an ``output_transform`` given here is applied to each state.

        Example:
            >>> import jaxloop as jl
            >>> stream = jl.loop(lambda b, s: s + b).stream([1, 2], init_state=0, epochs=2)
            >>> [int(state.step_state) for state in stream]
            [3, 6]
        """
        from jaxloop._engine.run import Run

        run = Run(self, data, init_state, epochs, iterations, jit, fuse, strict, debug)
        states = run.states()
        return states if output_transform is None else map(output_transform, states)

    def check(
        self,
        data: Any,
        init_state: PyTree = None,
        *,
        epochs: int = 1,
        iterations: int | None = None,
        jit: bool | Mapping[str, Any] = True,
        fuse: int | str = "auto",
        strict: bool = False,
        debug: bool = False,
        output_transform: Callable[[State], Any] | None = None,
    ) -> Report:
        """Checks all that can be known before the first step, and returns a report to print.

        Arguments as for `run`. The data's first batch is read.

        Example:
            >>> import jaxloop as jl
            >>> report = jl.loop(lambda b, s: s + b).check([1.0], init_state=0.0)
            >>> report.num_leaves
            1
        """
        from jaxloop._engine.run import Run

        del output_transform
        return Run(self, data, init_state, epochs, iterations, jit, fuse, strict, debug).report()

    def __repr__(self) -> str:
        lines = [f"Loop({name_of(self.step_fn)}"]
        if self.metrics:
            lines.append(f"  metrics: {', '.join(one.name for one in self.metrics)}")
        for one in self.attachments:
            events = "all" if len(one.events) == len(Event) else ", ".join(one.events)
            lines.append(f"  {one.kind} {one.name} on {events} when {one.filter!r}")
        if self.start is not None:
            lines.append(f"  from {self.start!r}")
        if self.resume_path is not None:
            lines.append(f"  resumes {self.resume_path}")
        return "\n".join(lines) + ")"


def loop(
    step_fn: Callable[[PyTree, PyTree], PyTree],
    init_fn: Callable[[PyTree, PyTree], PyTree] | None = None,
    output_transform: Callable[[State], Any] | None = None,
) -> Loop:
    """Makes a loop from any step.

    Args:
        step_fn: ``step_fn(batch, step_state)`` returns the next step state, a pytree of the same
            structure, shapes and dtypes, or ``jl.emit(next_state, name=value)``.
        init_fn: ``init_fn(batch, init_state)`` makes the first step state from a sample batch and
            what was passed to `run`. By default the initial state is taken as given.
        output_transform: Makes the output of `run` from the final `State`.

    Raises:
        ArgumentTypeError: Something that must be called cannot be.

    Example:
        >>> import jaxloop as jl
        >>> int(jl.loop(lambda batch, total: total + batch).run([1, 2], init_state=0).step_state)
        3
    """
    check_callable("loop", "step_fn", step_fn)
    for name, fn in (("init_fn", init_fn), ("output_transform", output_transform)):
        if fn is not None:
            check_callable("loop", name, fn)
    return Loop(step_fn, init_fn, output_transform)
