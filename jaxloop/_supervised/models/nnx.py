"""Flax NNX modules, whose model state is an `nnx.State`.

    adapter = adapt(module)

Invariant: the module is split once and never changed. The compiled step works on pure pytrees and
never runs `nnx.jit`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import ModelAdapter
from jaxloop._supervised.models.explain import is_about_arguments


def accepts(model: object) -> bool:
    """Returns whether ``model`` is an NNX module."""
    return isinstance(model, nnx.Module)


def adapt(module: nnx.Module) -> ModelAdapter:
    """Adapts an NNX module; its state holds all variables, and each `nnx.Param` is trained."""
    graph, start = nnx.split(nnx.clone(module))
    # Training and evaluation differ in static attributes of the module, which are in its graph.
    graphs = {}
    for train in (True, False):
        one = nnx.clone(module)
        one.train() if train else one.eval()
        graphs[train] = nnx.split(one)[0]

    def init(key: jax.Array, x: PyTree) -> PyTree:
        del key, x  # the module is initialized already
        return jax.tree.map(jnp.asarray, start)

    def apply(
        params: PyTree, rest: PyTree, x: PyTree, *, train: bool, key: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        del key  # the random streams are variables of the module
        # A copy, because variables of the outer trace cannot be changed inside a gradient.
        merged = nnx.merge(graphs[train], params, rest, copy=True)
        prediction = merged(x)
        return prediction, nnx.state(merged, nnx.Not(nnx.Param)) if train else rest

    def split(state: PyTree) -> tuple[PyTree, PyTree]:
        params, rest = nnx.split_state(state, nnx.Param, ...)
        return params, rest

    def load(given: Any) -> PyTree:
        return nnx.state(given) if isinstance(given, nnx.Module) else given

    return ModelAdapter(
        init=init,
        split=split,
        join=lambda params, rest: nnx.merge_state(params, rest),
        apply=apply,
        export=lambda state: nnx.merge(graph, state, copy=True),
        load=load,
        holds_state=True,
        explain=_explain,
        keeping_structure="make every variable of the module in __init__; a module in a loop "
        "cannot sow",
    )


def _explain(error: Exception) -> str | None:
    if isinstance(error, ValueError) and "rngs" in str(error):
        return (
            "the random streams of an NNX module are part of its state; give them to each layer "
            "when you make it, such as nnx.Dropout(0.5, rngs=rngs)"
        )
    if is_about_arguments(error):
        return "an NNX module is called with the inputs of a batch as its one argument"
    return None
