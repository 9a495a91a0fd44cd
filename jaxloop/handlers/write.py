"""Writing metrics, and what is computed from the state, with a writer.

    loop = write(loop, csv("metrics.csv"))
    loop = write(loop, tensorboard("runs/a"), every=50, values=histograms())

The metrics come from an observer, so they change no block. The writer works in a thread.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxloop._core.checks import check_callable, check_count, in_words, name_of
from jaxloop._core.dry import left_out
from jaxloop._core.events import Event
from jaxloop._core.filters import ALWAYS, Filter, Firing, every_seconds
from jaxloop._core.filters import every as every_nth
from jaxloop._core.state import Snapshot, State
from jaxloop._spec import Handler, HandlerFn, Observer, ObserverFn, RunStart, SpecT
from jaxloop.errors import ArgumentError, ArgumentTypeError, JaxloopError, WriterError, first_line
from jaxloop.writers import PlacedWriter, WriterDescription, WriterStart
from jaxloop.writers._delivery import Delivery
from jaxloop.writers._protocol import Writer, WriterLike
from jaxloop.writers._values import VALUES, is_drawn, join, on_host, start_copies

ValuesFn: TypeAlias = Callable[[State[Any]], Mapping[str, Any]]
"""Makes more values for a writer from the state."""

_EPOCH_EVENTS = (Event.EPOCH_COMPLETED, Event.EPOCH_HALTED)

_END_OF_A_BLOCK = every_seconds(1e-9)
"""True between any two blocks, and never inside one."""


def write(
    loop: SpecT,
    writer: WriterLike,
    *,
    every: int | Filter | None = None,
    values: ValuesFn | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> SpecT:
    """Writes the metrics of each epoch with ``writer``, and those of each ``every`` iterations.

    The writer gets one row per step, in order, in a thread. Each row has ``epoch`` and the metrics
    of the epoch so far, except for one named ``epoch``. The last row of an epoch also has what
    handlers such as `validate` added.
    If the run resumes from a checkpoint, no row is missing or doubled. A loop may have several
    writers.

    Args:
        loop: The loop.
        writer: Such as ``jl.writers.csv(path)``, or an object of your own with the methods
            ``write(step, values)`` and ``close()``.
        every: The number of iterations between two rows, or a filter such as
            ``jl.every_seconds(10)``. None writes a row per epoch.
        values: ``state -> {name: value}`` makes more values for the same rows: numbers, arrays,
            `writers.Image`, `writers.Text` or `writers.Histogram`. It is a handler: a block ends
            where it runs. Arrays on the device are copied to the host by the thread. See
            `writers.histograms` and `writers.predictions`.
        hyperparameters: ``{name: value}``, for writers that keep them.
        name: Its name in errors. Defaults to that of the writer.

    Returns:
        A new loop with the writer.

    Raises:
        ArgumentTypeError: An argument has the wrong type.
        ArgumentError: ``every`` is less than 1.
        WriterError: Raised by `run`: before the first step if the writer cannot be opened, and
            later if it fails.

    Example:
        >>> import jaxloop as jl
        >>> class Printer:
        ...     def write(self, step, values):
        ...         print(step, values)
        ...     def close(self):
        ...         print("the end")
        >>> loop = jl.loop(lambda batch, state: jl.emit(state, x=batch)).metric("x")
        >>> _ = loop.write(Printer(), every=2).run([1.0, 2.0, 6.0])
        2 {'epoch': 0, 'x': 1.5}
        3 {'epoch': 0, 'x': 3.0}
        the end
    """
    _check_writer(writer)
    cadence: Filter | None = None
    if isinstance(every, Filter):
        cadence = every
    elif every is not None:
        check_count("every", every, at_least=1, where="write")
        cadence = every_nth(every)
    if hyperparameters is not None and not isinstance(hyperparameters, Mapping):
        raise ArgumentTypeError(
            f"write: hyperparameters must be a dict of names and values, got {hyperparameters!r}",
            fix="pass a dict, such as {'learning_rate': 1e-3}",
        )
    if values is not None:
        check_callable("write", "values", values)
    name = name or f"write_{_name_of_writer(writer)}"
    plain = {str(key): _plain(value) for key, value in (hyperparameters or {}).items()}
    return _Rows(writer, cadence, values, plain, name).attach(loop)


def _check_writer(writer: object) -> None:
    if isinstance(writer, type) or not isinstance(writer, WriterDescription | Writer):
        raise ArgumentTypeError(
            "write: writer must have the methods write(step, values) and close(), or open(start), "
            f"got {writer!r:.80}",
            fix="pass a writer such as jl.writers.csv(path), and an object in place of a class",
        )


def _plain(value: Any) -> Any:
    """Returns a number of NumPy or JAX as one of Python, and anything else as it is."""
    is_number = isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0
    return value.item() if is_number else value


def _name_of_writer(writer: object) -> str:
    return name_of(writer).removesuffix("Description").lower()


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """What `write` was given. It attaches observers and handlers that share a `_Session`."""

    writer: WriterLike
    cadence: Filter | None
    values: ValuesFn | None
    hyperparameters: Mapping[str, Any]
    name: str

    @property
    def follows(self) -> bool:
        """Whether the handler alone decides which iterations have a row.

        Each attachment has a clock of its own, so with a filter of seconds, the handler and the
        observer would choose different iterations.
        """
        return self.values is not None and self.cadence is not None and self.cadence.timed

    def attach(self, loop: SpecT) -> SpecT:
        if self.values is not None:
            name = f"{self.name}_values"
            if self.cadence is not None:
                iteration = (Event.ITERATION_COMPLETED,)
                loop = loop.attach(
                    Handler(iteration, self.cadence, name, _unopened, open=self._collect)
                )
            loop = loop.attach(
                Handler(_EPOCH_EVENTS, ALWAYS, name, _unopened, open=self._collect_epoch)
            )
        if self.cadence is not None:
            iteration = (Event.ITERATION_COMPLETED,)
            loop = loop.attach(
                Observer(
                    iteration,
                    _END_OF_A_BLOCK if self.follows else self.cadence,
                    self.name,
                    _unopened,
                    open=self._iteration,
                    in_dry_run=left_out,
                )
            )
        where = self.writer.where if isinstance(self.writer, PlacedWriter) else None
        return loop.attach(
            Observer(
                _EPOCH_EVENTS,
                ALWAYS,
                self.name,
                _unopened,
                open=self._epoch,
                writes_to=where,
                in_dry_run=left_out,
            )
        )

    def _collect(self, start: RunStart) -> HandlerFn:
        return self._session(start).collect

    def _collect_epoch(self, start: RunStart) -> HandlerFn:
        return self._session(start).collect_epoch

    def _iteration(self, start: RunStart) -> ObserverFn:
        return self._session(start).show_iteration

    def _epoch(self, start: RunStart) -> _Session:
        session = self._session(start)
        session.open(start)
        return session

    def _session(self, start: RunStart) -> _Session:
        session: _Session = start.shared.setdefault(self, _Session(self))
        return session


class _Session:
    """One run of a writer: what the observers see, and what the handlers computed for them."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        self._collected: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()
        self._collected_at = -1
        self._delivery: Delivery | None = None
        self._failure: BaseException | None = None

    def open(self, start: RunStart) -> None:
        """Opens the writer."""
        rows, snapshot = self._rows, start.snapshot
        writer = rows.writer
        opened = start.shared.setdefault(_Session, [])
        if any(other is writer or other == writer for other in opened):
            raise ArgumentError(
                f"write: the writers of a loop must differ, got {writer!r:.80} twice",
                fix="write to each only once; every= writes the rows of epochs too",
            )
        opened.append(writer)
        if isinstance(writer, WriterDescription):
            metrics = (
                join(name, path)
                for name, value in start.metrics.items()
                for path, leaf in jax.tree_util.tree_leaves_with_path(value)
                if leaf.shape == ()
            )
            opening = WriterStart(
                step=snapshot.step,
                run_id=start.run_id,
                metrics=tuple(metrics),
                hyperparameters=rows.hyperparameters,
                branches=start.loop.start is not None,
            )
            try:
                writer = writer.open(opening)
            except JaxloopError:
                raise
            except Exception as error:
                raise WriterError(
                    f"writer `{rows.name}` must be opened before the first step, got "
                    f"{type(error).__name__}: {first_line(error)}",
                    fix="mend what it reports, or run the loop without this writer",
                ) from error
        self._delivery = Delivery(
            rows.name, writer, step=snapshot.step, written=self._written(snapshot)
        )

    def _written(self, snapshot: Snapshot) -> Collection[str]:
        """Returns the names that an earlier session has written for the step of ``snapshot``.

        If it ended between the last iteration of an epoch and the end of the epoch, the row of the
        iteration is there.
        """
        if not self._is_due_at_iteration(snapshot):
            return ()
        return on_host(_row(snapshot)).keys()

    def _is_due_at_iteration(self, view: Snapshot) -> bool:
        """Returns whether the last iteration of this epoch had a row."""
        cadence = self._rows.cadence
        if cadence is None or cadence.timed or cadence.asks:
            return False
        total, epoch = view.event_counts[Event.ITERATION_COMPLETED]
        return epoch > 0 and cadence.matches(Firing(total, epoch))

    # --- handlers ------------------------------------------------------------------------------

    def collect(self, state: State[Any]) -> None:
        """Computes more values for the row of a step."""
        assert self._rows.values is not None
        values = self._rows.values(state)
        _check_values(self._rows.name, values)
        start_copies(values)
        self._collected.append((state.step, values))
        self._collected_at = state.step

    def collect_epoch(self, state: State[Any]) -> None:
        """Does the same at the end of an epoch, unless the last iteration already did."""
        if self._collected_at != state.step and not self._is_due_at_iteration(state):
            self.collect(state)

    # --- observers -----------------------------------------------------------------------------

    def show_iteration(self, snapshot: Snapshot) -> None:
        """Hands over the row of an iteration."""
        if self._rows.follows and all(step != snapshot.step for step, _ in self._collected):
            return
        last, bound = snapshot.max_iteration, snapshot.max_step
        # The row of an epoch's last iteration waits for what the end of the epoch adds.
        complete = last is not None and snapshot.iteration + 1 < last
        self._put(snapshot, complete and (bound is None or snapshot.step < bound))

    def __call__(self, snapshot: Snapshot) -> None:
        """Hands over the row of an epoch."""
        self._put(snapshot, True)

    def _put(self, snapshot: Snapshot, complete: bool) -> None:
        assert self._delivery is not None
        row = _row(snapshot)
        collected = self._collected
        while collected and collected[0][0] <= snapshot.step:
            step, values = collected.popleft()
            if step == snapshot.step:
                row |= values
            else:  # a filter of the user was true for the handler alone
                self._delivery.put(step, values)
        self._delivery.put(snapshot.step, row, complete=complete)

    def sync(self) -> None:
        """Makes durable what was handed over."""
        assert self._delivery is not None
        self._delivery.sync()

    def fail(self, error: BaseException) -> None:
        """Is told of the error that ends the run."""
        self._failure = error

    def close(self) -> None:
        """Closes the writer."""
        assert self._delivery is not None
        self._delivery.close(self._failure)


def _row(snapshot: Snapshot) -> dict[str, Any]:
    """Returns the epoch and the metrics. A metric of that name does not replace the epoch."""
    return {"epoch": 0, **snapshot.metrics} | {"epoch": snapshot.epoch}


def _unopened(view: object) -> None:
    raise AssertionError("a run opens a writer before it calls it")


def _check_values(name: str, values: object) -> None:
    if not isinstance(values, Mapping):
        raise ArgumentTypeError(
            f"write: values of `{name}` must return a dict of names and values, got "
            f"{in_words(values)}",
            fix="return {name: value}",
        )
    for key, leaf in jax.tree_util.tree_leaves_with_path(dict(values), is_leaf=is_drawn):
        if not isinstance(leaf, VALUES):
            raise ArgumentTypeError(
                f"write: values of `{name}` must be numbers, arrays, writers.Image, writers.Text "
                f"or writers.Histogram, got {in_words(leaf)} at {jax.tree_util.keystr(key)}",
                fix="convert it, as in jl.writers.Text(str(value))",
            )
