"""Flax Linen modules, whose model state is Linen's variables.

    adapter = adapt(nn.Dense(10))

Invariant: the variables that `apply` returns have the collections that `init` made.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
from flax import errors
from flax import linen as nn

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import ModelAdapter
from jaxloop._supervised.models.explain import is_about_arguments
from jaxloop._supervised.models.flags import LINEN_FLAGS, TrainFlags
from jaxloop._supervised.models.statics import statics_of

_NOT_CARRIED = ("intermediates",)


def accepts(model: object) -> bool:
    """Returns whether ``model`` is a Linen module."""
    return isinstance(model, nn.Module)


def adapt(module: nn.Module) -> ModelAdapter:
    """Adapts a Linen module, and sets the train flag that its ``__call__`` declares."""
    flags = TrainFlags.of(LINEN_FLAGS, inspect.signature(type(module).__call__))

    def init(key: jax.Array, x: PyTree) -> PyTree:
        keys = dict(zip(("params", "dropout"), jax.random.split(key), strict=True))
        variables = module.init(keys, x, **flags.values(train=False))
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
            return module.apply(variables, x, rngs=rngs, **flags.values(train)), rest
        prediction, changed = module.apply(
            variables, x, rngs=rngs, mutable=list(rest), **flags.values(train)
        )
        return prediction, {**rest, **changed}

    return ModelAdapter(
        init,
        split,
        lambda params, rest: {"params": params, **rest},
        apply,
        explain=_explain,
        keeping_structure="make every variable in init too, which jaxloop calls with train=False; "
        "sow into 'intermediates', which jaxloop drops, or give sow a reduce_fn and an init_fn",
        statics=lambda: statics_of(module, _attributes, lambda value: False),
    )


def _attributes(node: Any) -> dict[str, Any] | None:
    if not isinstance(node, nn.Module):
        return None
    names = [field.name for field in dataclasses.fields(node)]
    return {name: getattr(node, name, None) for name in names if name not in ("parent", "name")}


def _explain(error: Exception) -> str | None:
    if isinstance(error, errors.InvalidRngError):
        return (
            "a Linen module gets the random streams 'params' and 'dropout' in init, and 'dropout' "
            "in apply; draw with self.make_rng('dropout')"
        )
    if isinstance(error, errors.FlaxError) and "ollection" in str(error):
        return (
            "the loop carries the collections that init makes; a training step may change them, "
            "and an evaluation may not. Make every variable in init too, and change it only if "
            f"the train flag of __call__ ({', '.join(LINEN_FLAGS)}) says so"
        )
    if is_about_arguments(error):
        return (
            "a Linen module is called with the inputs of a batch as its one argument, and with "
            f"the train flags that its __call__ declares ({', '.join(LINEN_FLAGS)})"
        )
    return None
