"""Flax Linen modules: the model state is Linen's variables.

adapt_linen(nn.Dense(10))
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
from flax import linen as nn

from jaxloop._supervised.models.adapted import Adapted, PyTree

TRAIN_FLAGS = {
    "train": True,
    "training": True,
    "deterministic": False,
    "use_running_average": False,
}
"""Arguments that a module's ``__call__`` may declare, and their value in training."""

_NOT_CARRIED = ("intermediates",)


def is_linen(model: Any) -> bool:
    """Whether ``model`` is a Linen module."""
    return isinstance(model, nn.Module)


def adapt_linen(module: nn.Module) -> Adapted:
    """A Linen module; its train flag is set if its ``__call__`` declares one."""
    declared = inspect.signature(type(module).__call__).parameters
    flags = [name for name in TRAIN_FLAGS if name in declared]

    def arguments(train: bool) -> dict[str, Any]:
        return {name: TRAIN_FLAGS[name] == train for name in flags}

    def init(key: jax.Array, x: PyTree) -> PyTree:
        keys = dict(zip(("params", "dropout"), jax.random.split(key), strict=True))
        variables = module.init(keys, x, **arguments(train=False))
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
            return module.apply(variables, x, rngs=rngs, **arguments(train)), rest
        prediction, changed = module.apply(
            variables, x, rngs=rngs, mutable=list(rest), **arguments(train)
        )
        return prediction, {**rest, **changed}

    return Adapted(init, split, lambda params, rest: {"params": params, **rest}, apply)
