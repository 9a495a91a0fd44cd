"""Guards against NaN and infinity in the step state.

    loop = nan_guard(checkpoint(loop, "runs/a"), "rewind")
    loop = nan_guard(loop, "skip")          # inside the compiled block; metric "skipped_steps"

Skipping is part of the step. Halting and rewinding are a guard's, which is also asked before each
save, so that a bad state never becomes a checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxloop._core.arrays import checked_state
from jaxloop._core.events import Event, EventLike, as_events
from jaxloop._core.filters import ALWAYS, FilterLike, as_filter
from jaxloop._core.state import State
from jaxloop._core.step_result import emit, split_emission
from jaxloop._core.types import PyTree
from jaxloop._spec import Guard, GuardAction, LoopSpec, SpecT
from jaxloop.errors import ArgumentError, unknown_name
from jaxloop.handlers.attach import metric
from jaxloop.metrics import SKIPPED, Metric

_ACTIONS = ("halt", "skip", "rewind")
_MOST_LEAVES = 5
"""How many leaves a message names."""


def nan_guard(
    loop: SpecT,
    action: Literal["halt", "skip", "rewind"] = "halt",
    *,
    event: EventLike = "iteration_completed",
    filter: FilterLike = {"every": 100},  # noqa: B006  it is only read
    name: str = "nan_guard",
) -> SpecT:
    """Checks the step state for NaN and infinity, and halts, skips or rewinds.

    "halt" and "rewind" check when ``filter`` says so, at the end of each epoch, and before each
    save: a state that is not finite is never saved. "skip" checks at every step, inside the
    compiled block, without waiting for it.

    Args:
        loop: The loop.
        action: "halt" ends the loop, with ``halted_by`` the guard's name. "skip" leaves state and
            metrics unchanged by a step that made a number of the state, or a reported ``loss``,
            infinite or NaN; the metric ``skipped_steps`` counts such steps. "rewind" returns to the
            state of the newest good checkpoint, with its metrics and the handlers' memories, and
            continues with the data that follow, so the bad stretch is left out. Without a
            checkpoint it halts.
        event: As for `handle`; "skip" does not use it.
        filter: As for `handle`; "skip" does not use it.
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
    if action not in _ACTIONS:
        raise unknown_name("action of nan_guard", action, _ACTIONS)
    if action == "skip":
        if any(one.name == SKIPPED for one in loop.metrics):
            raise ArgumentError(
                "nan_guard(action='skip') is attached already", fix="attach it once"
            )
        loop = loop.replace(step_fn=_skipping(loop.step_fn))
        count = Metric(lambda: jnp.int32(0), _count, jnp.add, lambda count: count)
        return metric(loop, count, SKIPPED, None, [SKIPPED])
    guard = Guard(
        as_events(event),
        as_filter(filter),
        name,
        _describe_problem,
        action=GuardAction(action),
        check=_check_has_checkpoint if action == "rewind" else None,
        unique=True,
    )
    at_end = dataclasses.replace(
        guard, events=(Event.EPOCH_COMPLETED,), filter=ALWAYS, unique=False
    )
    return loop.attach(guard).attach(at_end)


def _is_inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


@jax.jit
def _are_good(tree: PyTree) -> list[jax.Array]:
    # A single number may be infinite, such as a best value before the first.
    return [
        jnp.all(jnp.isfinite(leaf)) if leaf.ndim else ~jnp.isnan(leaf)
        for leaf in jax.tree.leaves(tree)
        if _is_inexact(leaf)
    ]


def _describe_problem(state: State[Any]) -> str | None:
    """Returns which leaves of the step state are not finite, or None."""
    tree = state.loan.step_state  # not `state.step_state`, which would mean a copy
    names = [
        f"step_state{jax.tree_util.keystr(path)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if _is_inexact(leaf)
    ]
    good = jax.device_get(_are_good(tree))
    bad = [name for name, fine in zip(names, good, strict=True) if not fine]
    if not bad:
        return None
    more = f" and {len(bad) - _MOST_LEAVES} more" if len(bad) > _MOST_LEAVES else ""
    return f"not finite: {', '.join(bad[:_MOST_LEAVES])}{more}"


def _skipping(step_fn: Callable[[PyTree, PyTree], PyTree]) -> Callable[..., PyTree]:
    """Returns the step, which changes nothing if its result is not finite, and reports that."""

    @functools.wraps(step_fn)
    def step(batch: PyTree, state: PyTree) -> PyTree:
        new, outputs = split_emission(step_fn(batch, state))
        new = checked_state(new, state)
        good = jnp.all(jnp.isfinite(outputs["loss"])) if "loss" in outputs else jnp.bool_(True)
        for after, before in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
            if _is_inexact(after):
                # A number that was infinite before, such as a best value, may stay so.
                good &= jnp.all(jnp.isfinite(after) | ~jnp.isfinite(before))
        kept = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        return emit(kept, **{**outputs, SKIPPED: (~good).astype(jnp.int32)})

    return step


def _check_has_checkpoint(loop: LoopSpec) -> None:
    if not loop.triggers():
        raise ArgumentError(
            "nan_guard(action='rewind') needs a checkpoint to return to, and the loop has none",
            fix="attach one: loop.checkpoint(path, ...)",
        )


def _count(count: jax.Array, skipped: jax.Array, weight: Any = None) -> jax.Array:
    del weight  # a step counts, whatever its examples weigh
    return count + skipped
