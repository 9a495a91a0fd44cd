"""The step states of the trainer as earlier versions saved them.

    saved_like = as_saved(record, like)            # the structure in which the record was saved
    state = as_now(unpack(record, trees), like)    # and back to the structure of today

Up to format 2, ``optimizer_state`` was a pair of the user's state and the scale of the learning
rate, and each step split the key. Invariant: parameters, optimizer and scale continue as they were
saved; a model that draws random numbers draws others than it would have then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxloop._core.state import State
from jaxloop._core.types import PyTree

_SCALE = "['optimizer_state'][1].learning_rate_scale"
_ADDED = ("learning_rate_scale", "num_steps")


class _Scale(NamedTuple):
    learning_rate_scale: Any


def as_saved(record: dict[str, Any], like: PyTree) -> PyTree:
    """Returns ``like``, a step state of today, in the structure in which a record was saved."""
    if not isinstance(like, dict) or not {"optimizer_state", *_ADDED} <= like.keys():
        return like
    if not any(path == _SCALE for path, _, _ in record["leaves"]["step_state"]):
        return like
    older = {name: value for name, value in like.items() if name not in _ADDED}
    scale = _Scale(like["learning_rate_scale"])
    return {**older, "optimizer_state": (like["optimizer_state"], scale)}


def as_now(state: State[Any], like: PyTree) -> State[Any]:
    """Returns a state whose step state has the structure of ``like``."""
    loan = state.loan
    step_state = loan.step_state
    if not isinstance(like, dict) or not isinstance(step_state, dict):
        return state
    if not set(_ADDED) <= like.keys() or set(_ADDED) & step_state.keys():
        return state
    optimizer_state, scale = step_state["optimizer_state"]
    number = like["num_steps"]
    added = {
        "optimizer_state": optimizer_state,
        "learning_rate_scale": scale.learning_rate_scale,
        "num_steps": jax.device_put(
            np.zeros(number.shape, number.dtype), getattr(number, "sharding", None)
        ),
    }
    return state.replace(step_state={**step_state, **added})
