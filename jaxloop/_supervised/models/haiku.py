"""Haiku's transformed functions.

    adapter = adapt(hk.transform(lambda x: hk.Linear(10)(x)))

Invariant: Haiku is not imported. The name of its type identifies a transformed function.
"""

from __future__ import annotations

from typing import Any

from jaxloop._supervised.models.adapter import ModelAdapter


def accepts(model: object) -> bool:
    """Returns whether ``model`` comes from `hk.transform` or `hk.transform_with_state`."""
    return type(model).__name__ in ("Transformed", "TransformedWithState")


def adapt(transformed: Any) -> ModelAdapter:
    """Adapts a transformed function; its state is ``params``, or ``(params, state)`` with state."""
    if type(transformed).__name__ == "TransformedWithState":
        return ModelAdapter(
            init=lambda key, x: tuple(transformed.init(key, x)),
            split=lambda state: (state[0], state[1]),
            join=lambda params, rest: (params, rest),
            apply=lambda params, rest, x, *, train, key: transformed.apply(params, rest, key, x),
        )
    return ModelAdapter(
        init=transformed.init,
        split=lambda state: (state, ()),
        join=lambda params, rest: params,
        apply=lambda params, rest, x, *, train, key: (transformed.apply(params, key, x), rest),
    )
