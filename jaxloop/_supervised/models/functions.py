"""Models that are functions already: `Model`, pairs as of stax, and Haiku's transforms.

adapt_pair(init, apply)     # init(key, x) -> params, apply(params, x) -> prediction
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxloop._supervised.models.adapted import Adapted, Model, PyTree


def adapt_model(model: Model) -> Adapted:
    """A `Model`; its state is ``(params, state)``."""
    return Adapted(
        init=lambda key, x: tuple(model.init(key, x)),
        split=lambda state: (state[0], state[1]),
        join=lambda params, rest: (params, rest),
        apply=lambda params, rest, x, *, train, key: model.apply(
            params, rest, x, train=train, key=key
        ),
    )


def adapt_pair(init: Callable[..., PyTree], apply: Callable[..., PyTree]) -> Adapted:
    """A plain pair; its state is ``params``."""
    return Adapted(
        init=init,
        split=lambda state: (state, ()),
        join=lambda params, rest: params,
        apply=lambda params, rest, x, *, train, key: (apply(params, x), rest),
    )


def adapt_haiku(transformed: Any) -> Adapted:
    """What `hk.transform` or `hk.transform_with_state` returned."""
    if type(transformed).__name__ == "TransformedWithState":
        return Adapted(
            init=lambda key, x: tuple(transformed.init(key, x)),
            split=lambda state: (state[0], state[1]),
            join=lambda params, rest: (params, rest),
            apply=lambda params, rest, x, *, train, key: transformed.apply(params, rest, key, x),
        )
    return Adapted(
        init=transformed.init,
        split=lambda state: (state, ()),
        join=lambda params, rest: params,
        apply=lambda params, rest, x, *, train, key: (transformed.apply(params, key, x), rest),
    )
