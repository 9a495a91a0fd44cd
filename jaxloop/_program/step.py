"""A step, traced once for each signature of its batch, checked, and split into its results.

    step = Step(step_fn, eager=False)
    jaxpr, (next_state, outputs) = step.trace(batch_shapes, state_shapes)
    new, outputs = step(batch, state)               # inside a compiled block

A block runs the traced step, so a user's function is called once per signature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxloop._core.arrays import abstract, as_array, checked_state, state_signature
from jaxloop._core.batch import Signature
from jaxloop._core.step_result import split_emission
from jaxloop._core.types import PyTree


class Step:
    """A user's step function.

    Args:
        step_fn: ``(batch, step_state) -> next step state`` or an `Emission`.
        eager: Whether it runs op by op, untraced.
    """

    def __init__(self, step_fn: Callable[[PyTree, PyTree], PyTree], *, eager: bool) -> None:
        self._fn, self._eager = step_fn, eager
        self._traces: dict[Signature, tuple[Any, Any]] = {}

    def trace(self, batch: PyTree, state: PyTree) -> tuple[Any, Any]:
        """Returns the closed jaxpr, and the shapes of ``(next state, outputs)``."""
        shapes = abstract((batch, state))
        key = state_signature(shapes)
        if key not in self._traces:
            self._traces[key] = jax.make_jaxpr(self._checked, return_shape=True)(*shapes)
        return self._traces[key]

    def _checked(self, batch: PyTree, state: PyTree) -> tuple[PyTree, dict[str, PyTree]]:
        new, outputs = split_emission(self._fn(batch, state))
        return checked_state(new, state), jax.tree.map(as_array, outputs)

    def outputs(self, batch: PyTree, state: PyTree) -> dict[str, PyTree]:
        """Returns the shapes of what the step reports."""
        shapes: dict[str, PyTree] = self.trace(batch, state)[1][1]
        return shapes

    def __call__(self, batch: PyTree, state: PyTree) -> tuple[PyTree, dict[str, PyTree]]:
        if self._eager:
            return self._checked(batch, state)
        jaxpr, shapes = self.trace(batch, state)
        flat = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *jax.tree.leaves((batch, state)))
        new, outputs = jax.tree.unflatten(jax.tree.structure(shapes), flat)
        return new, outputs
