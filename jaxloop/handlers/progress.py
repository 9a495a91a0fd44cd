"""Progress, shown by observers: bars in a terminal, a table in a notebook, otherwise lines.

    loop = progress(loop)
    loop = progress(loop, every=10, plot=True)

Showing progress never changes a run, because an observer only reads.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxloop._core.checks import check_count
from jaxloop._core.dry import left_out
from jaxloop._core.events import Event
from jaxloop._core.extras import check_extra
from jaxloop._core.filters import ALWAYS, Filter, every_seconds
from jaxloop._core.filters import every as every_n
from jaxloop._core.state import Snapshot
from jaxloop._progress.display import ENDS_EPOCH, ENDS_RUN, Display, form_of, num_examples
from jaxloop._progress.meter import Meter
from jaxloop._spec import Attachment, Observer, ObserverFn, RunStart, SpecT
from jaxloop.errors import ArgumentTypeError

_NAME = "progress"
_REDRAW_S = 0.1


def progress(loop: SpecT, *, every: int = 50, plot: bool = False, summary: bool = True) -> SpecT:
    """Shows the progress of a run, and a summary at its end. The trainer does so by default.

    If the loop shows progress already, the arguments of the last call hold.

    In a terminal, it shows bars with the rate, the time that is left and the latest metrics. The
    metrics of each epoch, with those of validations, scroll above them, like all that handlers
    print. In a notebook, it shows a table that is saved with the notebook. In a pipe or a file, in
    a terminal with ``TERM=dumb``, and for a run inside another run, it writes lines. Epochs are
    numbered as in `State.history`, and the bars count what is completed.

    The summary has the best value of each metric and its epoch, where the time went, the slowest
    handlers, and where handlers wrote to. After a resume, it is about all sessions of the run, with
    their goodput: the share of the running time that was neither spent on starting and compiling,
    nor on work that was lost and repeated.

    Args:
        loop: The loop.
        every: The number of iterations of an epoch between two lines. Bars and tables are updated
            by time instead, at most ten times a second.
        plot: Whether a notebook also shows the curves of the metrics. This needs matplotlib.
        summary: Whether to show the summary.

    Returns:
        A new loop that shows its progress.

    Raises:
        ArgumentError: ``every`` is less than 1.
        ArgumentTypeError: An argument has the wrong type.
        MissingExtraError: ``plot`` is True, and matplotlib is not installed.

    Example:
        >>> import jaxloop as jl
        >>> loop = jl.loop(lambda batch, state: state).progress(every=2, summary=False)
        >>> _ = loop.run([1, 2, 3], init_state=0)
        epoch 0, batch 1
        epoch 0, batch 3
    """
    check_count("every", every, at_least=1, where="progress")
    for name, value in (("plot", plot), ("summary", summary)):
        if not isinstance(value, bool):
            raise ArgumentTypeError(
                f"progress: {name} must be True or False, got {value!r}",
                fix=f"pass {name}=True or {name}=False",
            )
    if plot:
        check_extra("matplotlib", what="progress(plot=True)", extra="plot")
    key = object()

    def display(start: RunStart) -> Display:
        """Returns the display of a run, which its three observers share."""
        if key not in start.shared:
            meter = Meter(start.snapshot, num_examples(start.sample), start.max_time_s)
            form = form_of(nested=start.nested, plot=plot)
            ends = summary and not start.nested
            start.shared[key] = Display(form, meter, start, summarizes=ends)
        shown: Display = start.shared[key]
        return shown

    # Of these two, each run needs one.
    def lines(start: RunStart) -> ObserverFn | None:
        shown = display(start)
        return None if shown.is_live else shown.at_batch

    def bars(start: RunStart) -> ObserverFn | None:
        shown = display(start)
        return shown.at_time if shown.is_live else None

    def observer(
        events: tuple[Event, ...], filter: Filter, open: Callable[[RunStart], ObserverFn | None]
    ) -> Observer:
        return Observer(events, filter, _NAME, _unopened, open=open, in_dry_run=left_out)

    iterations = (Event.ITERATION_COMPLETED,)
    others = tuple(one for one in loop.attachments if not _shows_progress(one))
    return (
        loop.replace(attachments=others)
        .attach(observer((*ENDS_EPOCH, *ENDS_RUN), ALWAYS, display))
        .attach(observer(iterations, every_n(every, per="epoch"), lines))
        .attach(observer(iterations, every_seconds(_REDRAW_S), bars))
    )


def _shows_progress(one: Attachment) -> bool:
    return isinstance(one, Observer) and one.fn is _unopened


def _unopened(snapshot: Snapshot) -> None:
    """Shows nothing. A run calls what ``open`` returns."""
