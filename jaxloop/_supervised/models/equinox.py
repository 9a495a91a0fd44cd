"""Equinox modules, whose model state is the pytree of their arrays.

    adapter = adapt(eqx.nn.MLP(8, 2, 16, 1, key=key))

Invariant: the module is applied to each example of a batch, and its inexact arrays are trained.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import ModelAdapter


def accepts(model: object) -> bool:
    """Returns whether ``model`` is an Equinox module."""
    return isinstance(model, eqx.Module)


def adapt(module: Any) -> ModelAdapter:
    """Adapts an Equinox module without `eqx.nn.State`."""
    arrays, static = eqx.partition(module, eqx.is_array)
    is_dropout = lambda node: isinstance(node, eqx.nn.Dropout)  # noqa: E731  a predicate
    draws = any(map(is_dropout, jax.tree.leaves(module, is_leaf=is_dropout)))

    def apply(
        params: PyTree, rest: PyTree, x: PyTree, *, train: bool, key: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        model = eqx.nn.inference_mode(eqx.combine(params, rest, static), value=not train)
        if not (draws and train):
            return jax.vmap(model)(x), rest
        assert key is not None
        keys = jax.random.split(key, jax.tree.leaves(x)[0].shape[0])
        return jax.vmap(lambda one, k: model(one, key=k))(x, keys), rest

    return ModelAdapter(
        init=lambda key, x: jax.tree.map(jnp.asarray, arrays),
        split=lambda state: eqx.partition(state, eqx.is_inexact_array),
        join=eqx.combine,
        apply=apply,
        export=lambda state: eqx.combine(state, static),
        load=lambda given: None if given is None else eqx.filter(given, eqx.is_array),
    )
