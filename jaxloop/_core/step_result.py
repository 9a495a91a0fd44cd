"""The result of a step: its next state, and the outputs that it reports.

    def step(batch, params):
        ...
        return emit(new_params, loss=loss)      # `loss` is reported, not carried

    next_state, outputs = split_emission(step(batch, params))

Outputs go to metrics and handlers, and never into the next step.
"""

from __future__ import annotations

from typing import Any, Generic

import jax

from jaxloop._core.types import PyTree, S


@jax.tree_util.register_pytree_with_keys_class
class Emission(Generic[S]):
    """A step's result: the next step state, and the outputs that are reported, not carried.

    Attributes:
        state: The next step state.
        outputs: ``{name: pytree}``, reported to metrics and handlers.
    """

    __slots__ = ("outputs", "state")

    def __init__(self, state: S, outputs: dict[str, PyTree]) -> None:
        self.state = state
        self.outputs = outputs

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        key = jax.tree_util.GetAttrKey
        return ((key("state"), self.state), (key("outputs"), self.outputs)), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[S, dict[str, PyTree]]) -> Emission[S]:
        return cls(*children)

    def __repr__(self) -> str:
        return f"emit({self.state!r}, {', '.join(f'{k}={v!r}' for k, v in self.outputs.items())})"


def emit(next_state: S, **outputs: PyTree) -> Emission[S]:
    """Returns a step's next state together with what it reports to metrics and handlers.

    Args:
        next_state: The next step state, with the structure, shapes and dtypes of the current one.
        **outputs: Pytrees of arrays. Metrics find them by name, and ``state.outputs`` holds those
            of the last step. ``sample_weight``, of shape ``(batch,)``, weights every metric.

    Returns:
        An `Emission`. Return it from your step.

    Example:
        >>> emit({"w": 1.0}, loss=0.5).outputs
        {'loss': 0.5}
    """
    return Emission(next_state, outputs)


def split_emission(result: PyTree) -> tuple[PyTree, dict[str, PyTree]]:
    """Splits a step's result into ``(next state, outputs)``."""
    return (result.state, result.outputs) if isinstance(result, Emission) else (result, {})
