"""Flax NNX modules: split once; the compiled step sees pure pytrees and never runs `nnx.jit`.

adapt_nnx(module)      # the module itself is not changed
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxloop._supervised.models.adapted import Adapted, PyTree


def is_nnx(model: Any) -> bool:
    """Whether ``model`` is an NNX module."""
    return isinstance(model, nnx.Module)


def adapt_nnx(module: nnx.Module) -> Adapted:
    """An NNX module; its state is an `nnx.State` of all its variables, `nnx.Param` is trained."""
    graph, start = nnx.split(nnx.clone(module))
    # Training and evaluation differ in static attributes, and so in their graphs.
    graphs = {}
    for train in (True, False):
        one = nnx.clone(module)
        one.train() if train else one.eval()
        graphs[train] = nnx.split(one)[0]

    def init(key: jax.Array, x: PyTree) -> PyTree:
        del key, x  # the module came initialised
        return jax.tree.map(jnp.asarray, start)

    def apply(
        params: PyTree, rest: PyTree, x: PyTree, *, train: bool, key: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        del key  # its streams are variables of the module's own
        # A copy: variables of the outer trace cannot be changed inside a gradient.
        merged = nnx.merge(graphs[train], params, rest, copy=True)
        prediction = merged(x)
        return prediction, nnx.state(merged, nnx.Not(nnx.Param)) if train else rest

    def split(state: PyTree) -> tuple[PyTree, PyTree]:
        params, rest = nnx.split_state(state, nnx.Param, ...)
        return params, rest

    def load(given: Any) -> PyTree:
        return nnx.state(given) if isinstance(given, nnx.Module) else given

    return Adapted(
        init=init,
        split=split,
        join=lambda params, rest: nnx.merge_state(params, rest),
        apply=apply,
        export=lambda state: nnx.merge(graph, state, copy=True),
        load=load,
    )
