"""Flax Linen modules, whose model state is Linen's variables.

    adapter = adapt(nn.Dense(10))

Invariant: the variables that `apply` returns have the collections that `init` made.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
from flax import linen as nn

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import ModelAdapter
from jaxloop._supervised.models.statics import statics_of

TRAIN_FLAGS = {
    "train": True,
    "training": True,
    "deterministic": False,
    "use_running_average": False,
}
"""The train flags that a module's ``__call__`` may declare, and their values in training."""

_NOT_CARRIED = ("intermediates",)


def accepts(model: object) -> bool:
    """Returns whether ``model`` is a Linen module."""
    return isinstance(model, nn.Module)


def adapt(module: nn.Module) -> ModelAdapter:
    """Adapts a Linen module, and sets the train flag that its ``__call__`` declares."""
    declared = inspect.signature(type(module).__call__).parameters
    flags = [name for name in TRAIN_FLAGS if name in declared]

    def flag_values(train: bool) -> dict[str, Any]:
        return {name: TRAIN_FLAGS[name] == train for name in flags}

    def init(key: jax.Array, x: PyTree) -> PyTree:
        keys = dict(zip(("params", "dropout"), jax.random.split(key), strict=True))
        variables = module.init(keys, x, **flag_values(train=False))
        return {name: value for name, value in variables.items() if name not in _NOT_CARRIED}

    def split(state: PyTree) -> tuple[PyTree, PyTree]:
        rest = {name: value for name, value in state.items() if name != "params"}
        return state.get("params", {}), rest

    def apply(
        params: PyTree, rest: PyTree, x: PyTree, *, train: bool, key: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        variables = {"params": params, **rest}
        rngs = None if key is None else {"dropout": key}
        if not (train and rest):
            return module.apply(variables, x, rngs=rngs, **flag_values(train)), rest
        prediction, changed = module.apply(
            variables, x, rngs=rngs, mutable=list(rest), **flag_values(train)
        )
        return prediction, {**rest, **changed}

    return ModelAdapter(
        init,
        split,
        lambda params, rest: {"params": params, **rest},
        apply,
        statics=lambda: statics_of(module, _attributes, lambda value: False),
    )


def _attributes(node: Any) -> dict[str, Any] | None:
    if not isinstance(node, nn.Module):
        return None
    names = [field.name for field in dataclasses.fields(node)]
    return {name: getattr(node, name, None) for name in names if name not in ("parent", "name")}
