"""Haiku's transformed functions.

    adapter = adapt(hk.transform(lambda x: hk.Linear(10)(x)))

Invariant: Haiku is not imported. The name of its type identifies a transformed function.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import ModelAdapter, UseFn
from jaxloop._supervised.models.explain import is_about_arguments
from jaxloop._supervised.models.flags import HAIKU_FLAGS, TrainFlags
from jaxloop._supervised.models.functions import BoundFunctions
from jaxloop.errors import ModelError


def accepts(model: object) -> bool:
    """Returns whether ``model`` comes from `hk.transform` or `hk.transform_with_state`."""
    return type(model).__name__ in ("Transformed", "TransformedWithState")


def adapt(transformed: Any) -> ModelAdapter:
    """Adapts a transformed function, and sets the train flag that it declares.

    Its state is ``params``, or ``(params, state)`` with state.
    """
    # Haiku gives `init` and `apply` the parameters of the function, after its own.
    flags = TrainFlags.of(HAIKU_FLAGS, inspect.signature(transformed.init))
    with_rng = "rng" in inspect.signature(transformed.apply).parameters
    with_state = type(transformed).__name__ == "TransformedWithState"

    def init_fn(key: jax.Array, *args: PyTree, **kwargs: PyTree) -> tuple[PyTree, PyTree]:
        passed = {**flags.values(True, len(args), kwargs), **kwargs}
        state = transformed.init(key, *args, **passed)
        return tuple(state) if with_state else (state, ())

    def bound(state: Any, train: bool, key: jax.Array | None) -> BoundFunctions:
        def apply(
            params: PyTree, rest: PyTree, key: Any, *args: PyTree, **kwargs: PyTree
        ) -> tuple[PyTree, PyTree]:
            passed = {**flags.values(train, len(args), kwargs), **kwargs}
            keys = (key,) if with_rng else ()  # `hk.without_apply_rng` takes none
            if not with_state:
                return transformed.apply(params, *keys, *args, **passed), rest
            prediction, new_rest = transformed.apply(params, rest, *keys, *args, **passed)
            if not (train or flags.in_training):
                _check_unchanged(rest, new_rest)
            return prediction, new_rest

        return BoundFunctions(init_fn, apply, state, key=key)

    def init(key: jax.Array, use: UseFn) -> PyTree:
        one = bound(None, train=True, key=key)
        use(one)
        params, rest = one.first_state
        return (params, rest) if with_state else params

    return ModelAdapter(
        init=init,
        split=(lambda state: (state[0], state[1])) if with_state else lambda state: (state, ()),
        join=(lambda params, rest: (params, rest)) if with_state else lambda params, rest: params,
        bind=lambda params, rest, *, train, key: bound((params, rest), train, key),
        explain=_explain,
        keeping_structure="make every state in init too",
    )


def _check_unchanged(rest: PyTree, new_rest: PyTree) -> None:
    """Raises if a function without a train flag changes its state in an evaluation."""
    # What Haiku does not change, it returns as the same object.
    old = jax.tree_util.tree_leaves_with_path(rest)
    new = jax.tree.leaves(new_rest)
    changed = [jax.tree_util.keystr(p) for (p, a), b in zip(old, new, strict=True) if a is not b]
    if changed:
        raise ModelError(
            "a Haiku function without a train flag must not change its state in an evaluation, "
            f"which would run it in training mode, got a new value for {changed[0]}",
            fix="declare is_training as a parameter of the function that you transform, and pass "
            "it on to hk.BatchNorm and hk.dropout",
        )


def _explain(error: Exception) -> str | None:
    if type(error).__name__ == "MissingRNGError":
        return (
            "a Haiku function gets a random key in init and apply, unless it was made with "
            "hk.without_apply_rng; leave that out if the function draws random numbers"
        )
    if is_about_arguments(error):
        return (
            "a Haiku function is called with the inputs of a batch as its one argument, and with "
            f"the train flags that it declares ({', '.join(HAIKU_FLAGS)})"
        )
    return None
