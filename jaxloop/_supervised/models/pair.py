"""Models that are two functions: a `Model`, or a plain pair such as those of stax.

    adapter = adapt((init, apply))     # init(key, x) -> params, apply(params, x) -> prediction

Invariant: the functions are called as they are, so they must be pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeGuard

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import ModelAdapter
from jaxloop._supervised.models.explain import is_about_arguments

Pair = tuple[Callable[..., PyTree], Callable[..., PyTree]]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as two pure functions.

    Attributes:
        init: ``init(key, x) -> (params, state)``, where the optimizer trains ``params`` and the
            forward pass updates ``state``.
        apply: ``apply(params, state, x, *, train, key) -> (prediction, state)``.

    Example:
        >>> import jax.numpy as jnp
        >>> def init(key, x):
        ...     return jnp.zeros((x.shape[-1],)), {"calls": jnp.int32(0)}
        >>> def apply(params, state, x, *, train, key):
        ...     return x @ params, {"calls": state["calls"] + 1}
        >>> params, state = Model(init, apply).init(None, jnp.ones((4, 3)))
        >>> params.shape
        (3,)
    """

    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[PyTree, PyTree]]


def accepts(model: object) -> TypeGuard[Model | Pair]:
    """Returns whether ``model`` is a `Model` or a pair of functions."""
    if isinstance(model, Model):
        return True
    return isinstance(model, tuple) and len(model) == 2 and all(map(callable, model))


def adapt(model: Model | Pair) -> ModelAdapter:
    """Adapts a `Model` (its state is ``(params, state)``) or a pair (its state is ``params``)."""
    if isinstance(model, Model):
        apply_fn = model.apply
        return ModelAdapter(
            init=lambda key, x: tuple(model.init(key, x)),
            split=lambda state: (state[0], state[1]),
            join=lambda params, rest: (params, rest),
            apply=lambda params, rest, x, *, train, key: apply_fn(
                params, rest, x, train=train, key=key
            ),
            explain=_explain_model,
        )
    init, apply = model
    return ModelAdapter(
        init=init,
        split=lambda state: (state, ()),
        join=lambda params, rest: params,
        apply=lambda params, rest, x, *, train, key: (apply(params, x), rest),
        explain=_explain_pair,
    )


def _explain_model(error: Exception) -> str | None:
    if is_about_arguments(error):
        return (
            "a jl.Model is called as init(key, x) and apply(params, state, x, train=..., key=...), "
            "where x holds the inputs of a batch"
        )
    return None


def _explain_pair(error: Exception) -> str | None:
    text = str(error)
    if is_about_arguments(error) or "PRNG" in text or "rng" in text:
        return (
            "a pair is called as init(key, x) and apply(params, x), where x holds the inputs of a "
            "batch; pass a jl.Model(init, apply) if apply needs a key or a train flag"
        )
    return None
