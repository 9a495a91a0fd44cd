"""Guards against NaN and infinity in the step state.

    loop = nan_guard(checkpoint(loop, "runs/a"), "rewind")
    loop = nan_guard(loop, "skip")          # inside the compiled block; metric "skipped_steps"

Skipping is part of the compiled step. A guard halts or rewinds. The guard also runs before each
save, so a bad state is never saved.
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
"""The number of leaves that a message names."""


def nan_guard(
    loop: SpecT,
    action: Literal["halt", "skip", "rewind"] = "halt",
    *,
    event: EventLike = "iteration_completed",
    filter: FilterLike = {"every": 100},  # noqa: B006  it is only read
    name: str = "nan_guard",
) -> SpecT:
    """Checks the step state for NaN and infinity, and halts, skips or rewinds.

    "halt" and "rewind" check when ``filter`` matches, at the end of each epoch, and before each
    save, so a state that is not finite is never saved. "skip" checks every step inside the compiled
    block, without waiting for the device.

    Args:
        loop: The loop.
        action: "halt" halts the loop and sets ``halted_by`` to the guard's name. "skip" discards a
            step that makes a number in the state, or a reported ``loss``, NaN or infinite. State
            and metrics stay unchanged, and the metric ``skipped_steps`` counts the step. It also
            counts the steps that the trainer's ``loss_scale`` skips. "rewind"
            restores the step state, the metrics and the handlers' memories from the newest good
            checkpoint, and continues with the next data, so the bad part is left out. If there is
            no checkpoint yet, it halts.
        event: See `handle`. Ignored by "skip".
        filter: See `handle`. Ignored by "skip".
        name: Its name in ``halted_by``.

    Returns:
        A new loop with the guard.

    Raises:
        UnknownNameError: The action is unknown.
        ArgumentError: "skip" is attached twice. Raised by `run` if "rewind" has no `checkpoint`.

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
            raise ArgumentError("nan_guard(action='skip') is attached already", fix="call it once")
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
    # A scalar may be infinite, such as a best value before the first comparison.
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


def _is_finite(tree: PyTree) -> jax.Array:
    """Returns whether all numbers of a reported value are finite, a boolean scalar."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.all(
        jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves if _is_inexact(leaf)], jnp.bool_)
    )


def _skipping(step_fn: Callable[[PyTree, PyTree], PyTree]) -> Callable[..., PyTree]:
    """Wraps the step. If its result is not finite, the step changes nothing and reports a skip."""

    @functools.wraps(step_fn)
    def step(batch: PyTree, state: PyTree) -> PyTree:
        new, outputs = split_emission(step_fn(batch, state))
        new = checked_state(new, state)
        # A step that has skipped itself, as the trainer's loss scale does, reports what its loss
        # would have been. Its state is good, and holds the smaller scale.
        skipped_itself = jnp.asarray(outputs.get(SKIPPED, 0), jnp.bool_)
        good = skipped_itself | _is_finite(outputs.get("loss"))
        for after, before in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
            if _is_inexact(after):
                # A number that was infinite before, such as a best value, may stay infinite.
                good &= jnp.all(jnp.isfinite(after) | ~jnp.isfinite(before))
        kept = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        skipped = (~good | skipped_itself).astype(jnp.int32)
        return emit(kept, **{**outputs, SKIPPED: skipped})

    return step


def _check_has_checkpoint(loop: LoopSpec) -> None:
    if not loop.triggers():
        raise ArgumentError(
            "nan_guard(action='rewind') needs a checkpoint to return to, and the loop has none",
            fix="call loop.checkpoint(path, ...)",
        )


def _count(count: jax.Array, skipped: jax.Array, weight: Any = None) -> jax.Array:
    del weight  # a step counts as one, regardless of the weights of its examples
    return count + skipped
