"""Equinox modules, whose model state is the pytree of their arrays.

    adapter = adapt(eqx.nn.MLP(8, 2, 16, 1, key=key))

Invariant: the module is applied to each example of a batch, and its inexact arrays are trained.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import (
    BoundModel,
    ModelAdapter,
    UseFn,
    check_statics,
)
from jaxloop._supervised.models.explain import is_about_arguments
from jaxloop._supervised.models.statics import statics_of
from jaxloop.errors import ModelError


def accepts(model: object) -> bool:
    """Returns whether ``model`` is an Equinox module."""
    return isinstance(model, eqx.Module)


def adapt(module: Any) -> ModelAdapter:
    """Adapts an Equinox module. It gets a key if it has a dropout, or if it declares one.

    Raises:
        ModelError: The module needs an `eqx.nn.State`, as batch normalization does.
    """
    if _has(module, eqx.nn.StateIndex):
        raise ModelError(
            "an Equinox module must be a function of its inputs alone, got one that needs an "
            f"eqx.nn.State ({type(module).__name__} has an eqx.nn.StateIndex, as eqx.nn.BatchNorm "
            "does)",
            fix="pass a jl.Model(init, apply), whose init returns (parameters, eqx.nn.State) and "
            "whose apply calls the module with both under jax.vmap",
        )
    arrays, static = eqx.partition(module, eqx.is_array)
    # Every layer of Equinox takes a key and passes it on, whether or not it draws.
    call = getattr(type(module), "__call__", None)  # noqa: B004  its signature is needed
    takes_key = call is not None and "key" in inspect.signature(call).parameters
    draws = takes_key or _has(module, eqx.nn.Dropout)

    def bind(params: PyTree, rest: PyTree, /, *, train: bool, key: jax.Array | None) -> BoundModel:
        model = eqx.nn.inference_mode(eqx.combine(params, rest, static), value=not train)
        return _BoundModule(model, rest, key if draws else None)

    def init(key: jax.Array, use: UseFn) -> PyTree:
        state = jax.tree.map(jnp.asarray, arrays)
        use(bind(*split(state), train=True, key=key))
        return state

    def split(state: PyTree) -> tuple[PyTree, PyTree]:
        params, rest = eqx.partition(state, eqx.is_inexact_array)
        return params, rest

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
        init=init,
        split=split,
        join=eqx.combine,
        bind=bind,
        export=lambda state: eqx.combine(state, static),
        load=load,
        holds_state=True,
        explain=_explain,
        statics=statics,
    )


class _BoundModule:
    """The `BoundModel` of a module, which an objective gets as it is, for one example.

    Args:
        model: The module.
        rest: Its state besides the parameters.
        key: A key, if the module draws.
    """

    def __init__(self, model: Any, rest: PyTree, key: jax.Array | None) -> None:
        self.view, self._rest, self._key = model, rest, key

    def initialize(self, *args: PyTree, **kwargs: PyTree) -> None:
        pass  # a module holds its parameters

    def predict(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        if self._key is None:
            return jax.vmap(lambda a, k: self.view(*a, **k))(args, kwargs)
        keys = jax.random.split(self._key, jax.tree.leaves((args, kwargs))[0].shape[0])
        call = jax.vmap(lambda a, k, key: self.view(*a, key=key, **k))
        return call(args, kwargs, keys)

    def rest(self) -> PyTree:
        return self._rest


def _attributes(node: Any) -> dict[str, Any] | None:
    if not isinstance(node, eqx.Module):
        return None
    return {field.name: getattr(node, field.name, None) for field in dataclasses.fields(node)}


def _statics(module: Any) -> dict[str, str]:
    return statics_of(module, _attributes, eqx.is_array)


def _has(module: Any, kind: type) -> bool:
    """Returns whether a part of the module is of this kind."""
    leaves = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, kind))
    return any(isinstance(leaf, kind) for leaf in leaves)


def _explain(error: Exception) -> str | None:
    if is_about_arguments(error) or (isinstance(error, RuntimeError) and "key" in str(error)):
        return (
            "an Equinox module is called under jax.vmap with the inputs of one example as its one "
            "argument, and with key=, if its __call__ declares key; declare it, and pass it on to "
            "each layer that draws"
        )
    return None
