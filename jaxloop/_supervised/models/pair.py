"""Models that are two functions: a `Model`, or a plain pair such as those of stax.

    adapter = adapt((init, apply))     # init(key, x) -> params, apply(params, x) -> prediction

Invariant: the functions are called as they are, so they must be pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeGuard

import jax

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import ModelAdapter, UseFn
from jaxloop._supervised.models.explain import is_about_arguments
from jaxloop._supervised.models.functions import BoundFunctions

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
    return _adapt_model(model) if isinstance(model, Model) else _adapt_pair(*model)


def _adapt_model(model: Model) -> ModelAdapter:
    def bound(state: tuple[PyTree, PyTree] | None, train: bool, key: Any) -> BoundFunctions:
        def apply(params: PyTree, rest: PyTree, key: Any, *args: Any, **kwargs: Any) -> Any:
            return model.apply(params, rest, *args, train=train, key=key, **kwargs)

        return BoundFunctions(model.init, apply, state, key=key)

    def init(key: jax.Array, use: UseFn) -> PyTree:
        one = bound(None, train=True, key=key)
        use(one)
        return one.first_state

    return ModelAdapter(
        init=init,
        split=lambda state: (state[0], state[1]),
        join=lambda params, rest: (params, rest),
        bind=lambda params, rest, *, train, key: bound((params, rest), train, key),
        explain=_explain_model,
    )


def _adapt_pair(init_fn: Callable[..., PyTree], apply_fn: Callable[..., PyTree]) -> ModelAdapter:
    def bound(state: tuple[PyTree, PyTree] | None, key: Any) -> BoundFunctions:
        return BoundFunctions(
            lambda key, *args, **kwargs: (init_fn(key, *args, **kwargs), ()),
            lambda params, rest, key, *args, **kwargs: (apply_fn(params, *args, **kwargs), rest),
            state,
            key=key,
        )

    def init(key: jax.Array, use: UseFn) -> PyTree:
        one = bound(None, key)
        use(one)
        return one.first_state[0]

    return ModelAdapter(
        init=init,
        split=lambda state: (state, ()),
        join=lambda params, rest: params,
        bind=lambda params, rest, *, train, key: bound((params, rest), key),
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
