"""The summary of a run, as data: best values, where the time went, and what was written where.

    shown = summary(snapshot, better_of=start.better_of, writes=[("checkpoint", "runs/a")])
    print("\\n".join(text_of(shown, width=80)))

Invariant: a summary is made from a snapshot alone, so it is the same wherever it is shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxloop._core.checks import as_number
from jaxloop._core.sessions import Session
from jaxloop._core.state import Snapshot
from jaxloop._core.types import Better
from jaxloop._progress.figures import clean, counted, in_seconds, number, percent

_PARTS: dict[str, Callable[[Session], float]] = {
    "device": lambda one: one.device_s,
    "compiling": lambda one: one.compile_s,
    "waiting for data": lambda one: one.data_s,
    "dispatch": lambda one: one.dispatch_s,
    "validation": lambda one: one.validation_s,
    "handlers": lambda one: one.handlers_s,
    "saves": lambda one: one.saves_s,
    "starting": lambda one: one.start_s,
    "lost and repeated": lambda one: one.lost_s,
}
_LEAST_PART, _LEAST_HANDLER = 0.005, 0.01
"""Parts of the time and handlers with a smaller share are left out."""
_LEAST_S = 0.005
_MOST_HANDLERS, _MOST_METRICS = 10, 20


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        columns: The titles of the columns. The first column is aligned to the left, and the others
            to the right.
        rows: The cells.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is shown at the end of a run.

    Attributes:
        headline: How the run ended, and how long it took.
        tables: The tables, the most important first.
        notes: Sentences after the tables.
    """

    headline: str
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


def summary(
    snapshot: Snapshot,
    *,
    better_of: Callable[[str], Better | None] = lambda metric: None,
    writes: Sequence[tuple[str, str]] = (),
) -> Summary:
    """Returns the summary of a run.

    Args:
        snapshot: The last snapshot or `State` of the run.
        better_of: Returns which values of a metric are better, or None if this is unknown.
        writes: Who writes where: pairs of a name and a path.

    Example:
        >>> summary(Snapshot(epoch=2, step=6, status="completed")).headline
        'completed: 2 epochs, 6 steps'
    """
    sessions = snapshot.sessions
    tables = [best_values(snapshot.history, better_of)]
    if sessions:
        tables += [time_spent(sessions), slowest_handlers(sessions)]
    notes = [_goodput_note(sessions)] if len(sessions) > 1 else []
    notes += [f"{clean(who)} wrote to {clean(where)}" for who, where in writes]
    return Summary(
        _headline(snapshot, sessions), tuple(one for one in tables if one.rows), tuple(notes)
    )


def _headline(snapshot: Snapshot, sessions: Sequence[Session]) -> str:
    status: str = snapshot.status
    if snapshot.halted_by is not None:
        status += f" by {clean(snapshot.halted_by)}"
    text = f"{status}: {counted(snapshot.epoch, 'epoch')}"
    if snapshot.iteration:
        text += f" and {counted(snapshot.iteration, 'batch', 'batches')}"
    text += f", {counted(snapshot.step, 'step')}"
    if sessions:
        text += f" in {in_seconds(sum(one.elapsed_s for one in sessions))}"
    return text if len(sessions) < 2 else f"{text}, in {len(sessions)} sessions"


# --- best values ---------------------------------------------------------------------------------


def best_values(
    history: Mapping[int, Mapping[str, Any]],
    better_of: Callable[[str], Better | None] = lambda metric: None,
) -> Table:
    """Returns the best value of each metric, its epoch, and the last value.

    Epochs are numbered as in ``state.history``. If nothing says which values of a metric are
    better, its lowest value is shown as such. A single epoch has no best one, and no rows.

    Example:
        >>> history = {0: {"loss": 2.0}, 1: {"loss": 1.0}, 2: {"loss": 1.5}}
        >>> best_values(history, lambda metric: "min").rows
        (('loss', '1.0000', '1', '1.5000'),)
    """
    values: dict[str, list[tuple[int, float, str]]] = {}
    for epoch, metrics in history.items():
        for name, value in metrics.items():
            text, as_float = number(value), as_number(value)
            if text is not None and as_float is not None:
                values.setdefault(name, []).append((epoch, as_float, text))
    rows = []
    for name, those in values.items() if len(history) > 1 else ():
        finite = [one for one in those if one[1] == one[1]]
        last = those[-1][2]
        if not finite:
            rows.append((clean(name), "-", "-", last))
            continue
        better = better_of(name)
        pick = max if better == "max" else min
        epoch, _, text = pick(finite, key=lambda one: one[1])
        rows.append((clean(name), f"{text} (lowest)" if better is None else text, str(epoch), last))
    if len(rows) > _MOST_METRICS:
        left = len(rows) - _MOST_METRICS
        rows = [*rows[:_MOST_METRICS], (f"and {left} more", "", "", "")]
    return Table(("metric", "best", "epoch", "last"), tuple(rows))


# --- where the time went -------------------------------------------------------------------------


def time_spent(sessions: Sequence[Session]) -> Table:
    """Returns the parts of the time, the largest first.

    Shares under half a percent are left out. After a resume, there is a column for this session and
    one for all.

    Example:
        >>> session = Session(began=0.0, first_step=0, last_step=9, elapsed_s=4.0, compile_s=1.0)
        >>> time_spent([session]).rows
        (('device', '3.00 s', '75 %'), ('compiling', '1.00 s', '25 %'))
    """
    groups = [sessions[-1:]] if len(sessions) == 1 else [sessions[-1:], sessions]
    parts = [_parts_of(group) for group in groups]
    totals = [sum(part.values()) or 1.0 for part in parts]
    names = sorted(parts[-1], key=lambda name: -parts[-1][name])
    rows = []
    for name in names:
        shares = [part[name] / total for part, total in zip(parts, totals, strict=True)]
        if max(shares) >= _LEAST_PART and parts[-1][name] >= _LEAST_S:
            cells: list[str] = []
            for part, share in zip(parts, shares, strict=True):
                cells += [in_seconds(part[name]), percent(share)]
            rows.append((name, *cells))
    titles = ("time", "", "share") if len(groups) == 1 else ("time", "last", "", "all", "share")
    return Table(titles, tuple(rows))


def _parts_of(sessions: Sequence[Session]) -> dict[str, float]:
    return {name: sum(map(part, sessions)) for name, part in _PARTS.items()}


def slowest_handlers(sessions: Sequence[Session]) -> Table:
    """Returns the handlers, observers, validations and checkpoints, the slowest first.

    Those that took less than a hundredth of the time are left out.
    """
    total = sum(one.elapsed_s for one in sessions) or 1.0
    seconds: dict[str, float] = {}
    for session in sessions:
        for name, spent_s in session.by_handler.items():
            seconds[name] = seconds.get(name, 0.0) + spent_s
    slowest = sorted(seconds.items(), key=lambda item: -item[1])[:_MOST_HANDLERS]
    rows = [
        (clean(name), in_seconds(spent_s), percent(spent_s / total))
        for name, spent_s in slowest
        if spent_s / total >= _LEAST_HANDLER and spent_s >= _LEAST_S
    ]
    return Table(("handler", "", "share"), tuple(rows))


def goodput(sessions: Sequence[Session]) -> float:
    """Returns the share of the running time that made progress.

    Each session takes ``elapsed_s + lost_s``. Of this, ``start_s`` and ``compile_s`` are spent
    before anything is trained, and the work of ``lost_s`` is done again by the next session. The
    rest makes progress. Time in which no process ran does not count.

    Example:
        >>> parts = {"began": 0.0, "first_step": 0, "last_step": 9, "elapsed_s": 8.0}
        >>> goodput([Session(**parts, start_s=1.0, lost_s=2.0), Session(**parts, compile_s=2.0)])
        0.7222222222222222
    """
    total = sum(one.elapsed_s + one.lost_s for one in sessions)
    made = sum(one.elapsed_s - one.start_s - one.compile_s for one in sessions)
    return max(0.0, made / total) if total else 0.0


def _goodput_note(sessions: Sequence[Session]) -> str:
    lost_s = sum(one.lost_s for one in sessions)
    without = sum(one.start_s + one.compile_s for one in sessions)
    return (
        f"goodput {percent(goodput(sessions))}: starting and compiling took {in_seconds(without)}, "
        f"and {in_seconds(lost_s)} of work was lost and repeated"
    )
