"""What a step returns: its next state, and what it reports."""

from __future__ import annotations

from typing import Any

import jax

from jaxloop._core.types import PyTree


@jax.tree_util.register_pytree_with_keys_class
class Emission:
    """A step's result: the next ``state``, and the ``outputs`` that are reported, not carried."""

    __slots__ = ("outputs", "state")

    def __init__(self, state: PyTree, outputs: dict[str, PyTree]) -> None:
        self.state = state
        self.outputs = outputs

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        key = jax.tree_util.GetAttrKey
        return ((key("state"), self.state), (key("outputs"), self.outputs)), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[PyTree, dict[str, PyTree]]) -> Emission:
        return cls(*children)

    def __repr__(self) -> str:
        return f"emit({self.state!r}, {', '.join(f'{k}={v!r}' for k, v in self.outputs.items())})"


def emit(next_state: PyTree, **outputs: PyTree) -> Emission:
    """Returns a step's next state together with what it reports to metrics and handlers.

    Args:
        next_state: The next step state, of the same structure, shapes and dtypes as the last.
        **outputs: Pytrees of arrays. Metrics find them by name; ``state.outputs`` holds those of
            the last step. ``sample_weight``, of shape ``(batch,)``, weights every metric.

    Returns:
        An `Emission`, to be returned from the step.

    Example:
        >>> emit({"w": 1.0}, loss=0.5).outputs
        {'loss': 0.5}
    """
    return Emission(next_state, outputs)


def split_emission(result: PyTree) -> tuple[PyTree, dict[str, PyTree]]:
    """A step's result as ``(next state, outputs)``."""
    return (result.state, result.outputs) if isinstance(result, Emission) else (result, {})
