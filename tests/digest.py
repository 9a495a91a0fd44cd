"""Hashes of everything that two runs must have in common, bit for bit: all but the times."""

from __future__ import annotations

import hashlib

import jax
import numpy as np

# `run` counts these events anew, so a run that was resumed has other counts.
PER_RUN = ("started", "completed", "halted")


def raw(leaf):
    """A leaf as plain bytes, with its dtype and shape."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return (str(array.dtype), array.shape, array.tobytes())


def hash_tree(tree):
    """The SHA-256 of a pytree's paths, dtypes, shapes and bytes."""
    leaves = [
        (jax.tree_util.keystr(path), leaf if isinstance(leaf, str) else raw(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return hashlib.sha256(repr(leaves).encode()).hexdigest()


def digest(state, output=None):
    """``{what: hash}`` of a `State` and of the output of `run`."""
    counts = {e.value: n for e, n in state.event_counts.items() if e.value not in PER_RUN}
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
    return {name: hash_tree(part) for name, part in parts.items()}
