"""Flax Linen modules, whose model state is Linen's variables.

    adapter = adapt(nn.Dense(10))

Invariant: the variables that `apply` returns have the collections that `init` made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
from flax import errors
from flax import linen as nn

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import BoundModel, ModelAdapter, UseFn
from jaxloop._supervised.models.explain import is_about_arguments
from jaxloop._supervised.models.flags import LINEN_FLAGS
from jaxloop._supervised.models.functions import call_key
from jaxloop._supervised.models.linen_bound import BoundModule, is_sown, stream_keys
from jaxloop._supervised.models.statics import statics_of


def accepts(model: object) -> bool:
    """Returns whether ``model`` is a Linen module."""
    return isinstance(model, nn.Module)


def adapt(module: nn.Module, streams: Collection[str] = ()) -> ModelAdapter:
    """Adapts a Linen module, and sets the train flags that its methods declare.

    Args:
        module: The module.
        streams: The random streams that it gets besides "dropout" and those that it asks for.
    """

    def init(key: jax.Array, use: UseFn) -> PyTree:
        params_key, dropout_key = jax.random.split(key)
        keys = {
            **stream_keys(dropout_key, streams),
            "params": params_key,
            "dropout": dropout_key,
        }
        bound = BoundModule(module, None, train=False, keys=lambda num_calls, asked: keys)
        use(bound)
        return {n: value for n, value in bound.variables.items() if not is_sown(n, value)}

    def split(state: PyTree) -> tuple[PyTree, PyTree]:
        rest = {name: value for name, value in state.items() if name != "params"}
        return state.get("params", {}), rest

    def bind(params: PyTree, rest: PyTree, /, *, train: bool, key: jax.Array | None) -> BoundModel:
        def keys(num_calls: int, asked: Collection[str]) -> dict[str, jax.Array] | None:
            if key is None:
                return None
            return stream_keys(call_key(key, num_calls), {"dropout", *streams, *asked})

        return BoundModule(module, {"params": params, **rest}, train=train, keys=keys)

    return ModelAdapter(
        init,
        split,
        lambda params, rest: {"params": params, **rest},
        bind,
        explain=_explain,
        keeping_structure="make every variable in init too, which jaxloop calls with train=False; "
        "sow with the default reduce_fn, or give sow a reduce_fn and an init_fn",
        statics=lambda: statics_of(module, _attributes, lambda value: False),
    )


def _attributes(node: Any) -> dict[str, Any] | None:
    if not isinstance(node, nn.Module):
        return None
    names = [field.name for field in dataclasses.fields(node)]
    return {name: getattr(node, name, None) for name in names if name not in ("parent", "name")}


def _explain(error: Exception) -> str | None:
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
