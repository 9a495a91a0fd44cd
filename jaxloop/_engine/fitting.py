"""Whether the state of an earlier run fits this loop, apart from its arrays.

    check_statics(state, statics_of(spec))  # the model's attributes, as far as they are known
    check_metrics(state, meanings)          # what the accumulators of an open epoch mean
    compared_environment(state, step_state) # the versions and devices; they only warn

The checks raise before the first step. What an older version did not save is not compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from jaxloop._core.environment import changes, environment_of
from jaxloop._core.fingerprint import MOST_SHOWN, differences, stable
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop._program.block import Program
from jaxloop._spec import LoopSpec
from jaxloop.errors import SerializationError
from jaxloop.metrics.declare import BatchMean, Derived
from jaxloop.metrics.meaning import Meanings, kind_of

_DERIVED = "derived"
"""The key under which the meaning of a derived metric is, in place of ``kind`` and ``leaves``."""


def statics_of(spec: LoopSpec) -> Mapping[str, str]:
    """Returns what the model of a loop is made of besides its arrays; see `State.statics`."""
    return {} if spec.task is None else spec.task.statics()


def check_statics(state: State[Any], mine: Mapping[str, str]) -> None:
    """Raises if the state belongs to a model with other attributes.

    Raises:
        SerializationError: They differ. The error names them.
    """
    saved = state.statics
    if not saved or not mine or saved == mine:
        return
    found = differences(saved, mine)
    if not found:
        return
    more = f"; and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
    raise SerializationError(
        "the state to resume from belongs to a model with other attributes: "
        + "; ".join(found[:MOST_SHOWN])
        + more,
        fix="make the model as it was, or use another folder; if you want the change, continue "
        "with loop.from_state(state.replace(statics={})), where state = jl.restore(path, like=...)",
    )


def compared_environment(state: State[Any] | None, step_state: PyTree) -> dict[str, str]:
    """Returns the environment of this run, and warns if the state was computed in another one."""
    mine = environment_of(step_state)
    found = [] if state is None else changes(state.environment, mine)
    if found:
        warnings.warn(
            f"the state to resume from was computed elsewhere: {'; '.join(found)}; the run "
            "continues, but the last bits of its numbers may differ from those of a run that was "
            "never interrupted\n"
            "  fix: if you need the same bits, resume with the same versions on devices of the "
            "same kind and number; otherwise, ignore this warning",
            stacklevel=2,
        )
    return mine


def meanings_of(spec: LoopSpec, program: Program | None = None) -> Meanings:
    """Returns what the metrics of a loop mean.

    The meaning of an accumulator lacks its leaves if no program is known. A derived metric has no
    accumulator.
    """
    meanings: Meanings = {}
    for one in spec.metrics:
        if isinstance(one.metric, Derived):
            meanings[one.name] = {_DERIVED: kind_of(one)}
            continue
        known = None if program is None else program.meanings.get(one.name)
        meaning = {"kind": kind_of(one)} if known is None else dict(known)
        if isinstance(one.metric, BatchMean) and spec.task is not None:
            # It averages the trainer's own loss, so its declaration does not say which one.
            meaning["kind"] += f" of {stable(spec.task.loss)}"
        meanings[one.name] = meaning
    return meanings


def metric_changes(state: State[Any], mine: Meanings) -> list[str]:
    """Returns a sentence for each metric that is not the one that the state accumulates."""
    if state.metric_meanings is None:
        return []
    saved, current = _accumulated(state.metric_meanings), _accumulated(mine)
    changes = []
    for name in sorted({**saved, **current}):
        was, now = saved.get(name), current.get(name)
        if was is None or now is None:
            changes.append(f"{name!r} is {'new' if was is None else 'missing'}")
            continue
        for part in ("kind", "leaves"):
            if part in was and part in now and was[part] != now[part]:
                changes.append(f"{name!r} was {was[part]} and is {now[part]}")
                break
    return changes


def derived_changes(state: State[Any], mine: Meanings) -> set[str]:
    """Returns the names of the derived metrics that are new, missing or derived differently."""
    saved = state.metric_meanings or {}
    return {
        name
        for name in {*saved, *mine}
        if saved.get(name, {}).get(_DERIVED) != mine.get(name, {}).get(_DERIVED)
    }


def _accumulated(meanings: Mapping[str, Mapping[str, str]]) -> dict[str, Mapping[str, str]]:
    return {name: one for name, one in meanings.items() if _DERIVED not in one}


def check_metrics(state: State[Any], mine: Meanings) -> None:
    """Raises if the state is in the middle of an epoch with other metrics.

    Raises:
        SerializationError: They differ. The error names them.
    """
    changes = metric_changes(state, mine)
    if changes:
        raise SerializationError(
            f"the state to resume from is in the middle of epoch {state.epoch}, and its "
            f"accumulators belong to other metrics: {'; '.join(changes)}",
            fix=f"finish the epoch with the metrics of the earlier run (epochs={state.epoch + 1}) "
            "and change them after it, continue from a checkpoint at the end of an epoch with "
            "from_state(jl.restore(path, step, like=...)), or use another folder",
        )


def packs_by_dtype(state: State[Any]) -> bool:
    """Returns whether accumulators are packed as in formats 1 to 3, which knew no environment."""
    return not state.environment
