"""What two runs must have in common, bit for bit: everything but the times."""

from __future__ import annotations

import hashlib

import jax
import numpy as np

from jaxloop._core.events import PER_RUN


def raw(leaf):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return (str(array.dtype), array.shape, array.tobytes())


def digest(state, output=None):
    """``{what: hash}`` of a `State` and of what `run` returned."""
    counts = {e.value: n for e, n in state.event_counts.items() if e not in PER_RUN}
    parts = {
        "step_state": state.step_state,
        "history": dict(state.history),
        "metrics": dict(state.metrics),
        "handler_state": dict(state.handler_state),
        "event_counts": counts,
        "counters": (state.epoch, state.iteration, state.step),
        "ending": (state.status, state.halted_by),
        "output": output,
    }
    return {
        name: hashlib.sha256(
            repr(
                [
                    (jax.tree_util.keystr(path), leaf if isinstance(leaf, str) else raw(leaf))
                    for path, leaf in jax.tree_util.tree_leaves_with_path(part)
                ]
            ).encode()
        ).hexdigest()
        for name, part in parts.items()
    }
