"""Equinox modules, whose model state is the pytree of their arrays.

    adapter = adapt(eqx.nn.MLP(8, 2, 16, 1, key=key))

Invariant: the module is applied to each example of a batch, and its inexact arrays are trained.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import ModelAdapter, check_statics
from jaxloop._supervised.models.statics import statics_of


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

    statics = functools.cache(functools.partial(_statics, module))

    def load(given: Any) -> PyTree:
        if isinstance(given, eqx.Module):
            check_statics(
                _statics(given),
                statics(),
                "make the loop with this module, or pass the arrays of the loop's own with "
                "eqx.tree_at",
            )
        return None if given is None else eqx.filter(given, eqx.is_array)

    return ModelAdapter(
        init=lambda key, x: jax.tree.map(jnp.asarray, arrays),
        split=lambda state: eqx.partition(state, eqx.is_inexact_array),
        join=eqx.combine,
        apply=apply,
        export=lambda state: eqx.combine(state, static),
        load=load,
        statics=statics,
    )


def _attributes(node: Any) -> dict[str, Any] | None:
    if not isinstance(node, eqx.Module):
        return None
    return {field.name: getattr(node, field.name, None) for field in dataclasses.fields(node)}


def _statics(module: Any) -> dict[str, str]:
    return statics_of(module, _attributes, eqx.is_array)
