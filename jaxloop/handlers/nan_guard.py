"""What to do when the numbers of the state are no numbers any more.

    loop.checkpoint("runs/a").nan_guard(action="rewind")
    loop.nan_guard(action="skip")           # inside the compiled block; metric "skipped_steps"

Skipping is part of the step; halting and going back are a guard's, which is also asked before
anything is saved: a bad state never becomes a checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxloop._core.arrays import checked_state
from jaxloop._core.events import Event, as_events
from jaxloop._core.filters import ALWAYS, as_filter
from jaxloop._core.state import State
from jaxloop._core.step_result import emit, split_emission
from jaxloop._core.types import PyTree
from jaxloop._loop import Loop
from jaxloop._spec import Attachment, EventLike, FilterLike
from jaxloop.errors import ArgumentError, unknown_name
from jaxloop.metrics import SKIPPED, Metric

ACTIONS = ("halt", "skip", "rewind")
MOST_LEAVES = 5
"""So many are named in a message."""


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


@jax.jit
def _good_leaves(tree: PyTree) -> list[jax.Array]:
    # A single number may be infinite, such as a best value before there is one.
    return [
        jnp.all(jnp.isfinite(leaf)) if leaf.ndim else ~jnp.isnan(leaf)
        for leaf in jax.tree.leaves(tree)
        if _is_inexact(leaf)
    ]


@dataclasses.dataclass(frozen=True)
class _Guard:
    """Says what is wrong with a state, or None."""

    def __call__(self, state: State) -> str | None:
        tree = state._cell.step_state  # looking does not keep it from being donated
        names = [
            f"step_state{jax.tree_util.keystr(path)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if _is_inexact(leaf)
        ]
        good = jax.device_get(_good_leaves(tree))
        bad = [name for name, fine in zip(names, good, strict=True) if not fine]
        if not bad:
            return None
        more = f" and {len(bad) - MOST_LEAVES} more" if len(bad) > MOST_LEAVES else ""
        return f"not finite: {', '.join(bad[:MOST_LEAVES])}{more}"


def _stepping_over(step_fn: Callable[[PyTree, PyTree], PyTree]) -> Callable[..., PyTree]:
    """The step, which changes nothing where its result is not finite, and reports that."""

    @functools.wraps(step_fn)
    def step(batch: PyTree, state: PyTree) -> PyTree:
        new, outputs = split_emission(step_fn(batch, state))
        new = checked_state(new, state)
        good = jnp.all(jnp.isfinite(outputs["loss"])) if "loss" in outputs else jnp.bool_(True)
        for after, before in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
            if _is_inexact(after):
                # What was infinite before, such as a best value, may stay so.
                good &= jnp.all(jnp.isfinite(after) | ~jnp.isfinite(before))
        kept = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        return emit(kept, **{**outputs, SKIPPED: (~good).astype(jnp.int32)})

    return step


def _needs_saver(loop: Loop) -> None:
    if not any(one.open is not None for one in loop.attachments):
        raise ArgumentError(
            "nan_guard(action='rewind') has no checkpoint to go back to",
            fix="attach one: loop.checkpoint(path, ...)",
        )


def attach_nan_guard(
    loop: Loop, action: str, event: EventLike, filter: FilterLike, name: str
) -> Loop:
    """See `Loop.nan_guard`."""
    if action not in ACTIONS:
        raise unknown_name("action of nan_guard", action, ACTIONS)
    if action == "skip":
        if any(one.name == SKIPPED for one in loop.metrics):
            raise ArgumentError("nan_guard(action='skip') was attached before")
        loop = dataclasses.replace(loop, step_fn=_stepping_over(loop.step_fn))
        count = Metric(lambda: jnp.int32(0), _count, jnp.add, lambda count: count)
        return loop.metric(count, SKIPPED, None, [SKIPPED])
    rewinds = action == "rewind"
    guard = Attachment(
        as_events(event),
        _Guard(),
        as_filter(filter),
        name,
        kind="guard",
        adds=(),
        prepare=_needs_saver if rewinds else None,
        rewinds=rewinds,
        reserved=True,
    )
    end = (Event.EPOCH_COMPLETED,)
    at_end = dataclasses.replace(guard, events=end, filter=ALWAYS, reserved=False)
    return loop.attach(guard).attach(at_end)


def _count(count: jax.Array, skipped: jax.Array, weight: Any = None) -> jax.Array:
    del weight  # a step counts, whatever its examples weigh
    return count + skipped
