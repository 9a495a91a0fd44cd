"""The values that metrics may read: a step's outputs, its state, and its batch.

    inputs = Inputs.of(outputs, step_state, batch)
    y_true, y_pred = inputs.arguments(spec)

Invariant: a value that the step reports hides a carried value of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.metrics.declare import MetricSpec
from jaxloop.metrics.weights import leading_axis


@dataclass(frozen=True)
class Inputs:
    """The values of one step by name.

    Attributes:
        reported: The outputs that the step reports.
        named: The outputs and the carried values. If both have the same name, the output counts.
        batch: The batch. Metrics read only its number of examples.
    """

    reported: dict[str, PyTree]
    named: dict[str, PyTree]
    batch: PyTree

    @classmethod
    def of(cls, outputs: PyTree, step_state: PyTree, batch: PyTree) -> Inputs:
        """Makes the inputs of a step. Only mappings have named values."""
        reported = _as_dict(outputs)
        return cls(reported, {**_as_dict(step_state), **reported}, batch)

    def abstract(self) -> Inputs:
        """Returns the same inputs with `jax.ShapeDtypeStruct` in place of arrays."""
        # Value by value, because JAX sorts the keys of a dict, and not all keys compare.
        reported, named = (
            {name: jax.tree.map(_shape_of, value) for name, value in values.items()}
            for values in (self.reported, self.named)
        )
        return Inputs(reported, named, self.batch)

    @property
    def weight(self) -> ArrayLike | None:
        """The reported ``sample_weight``, or None."""
        return self.reported.get("sample_weight")

    def arguments(self, spec: MetricSpec) -> tuple[PyTree, ...]:
        """Returns the arguments that a metric takes from these values.

        Raises:
            UnknownNameError: A field is neither reported nor carried.
            ArgumentTypeError: The transform did not return a list.
        """
        if callable(spec.fields):
            args = spec.fields(self.named)
            if not isinstance(args, tuple | list):
                raise errors.ArgumentTypeError(
                    f"the transform of {spec.title} must return a list of arguments, got "
                    f"{type(args).__name__}",
                    fix="return the list of the metric's arguments",
                )
            return tuple(args)
        for field in spec.fields:
            if field not in self.named:
                raise errors.unknown_name(f"field of {spec.title}", field, map(str, self.named))
        return tuple(self.named[field] for field in spec.fields)

    def masked(self, spec: MetricSpec) -> Inputs:
        """Returns the inputs with weight 0 for the examples that ``where`` leaves out.

        Raises:
            UnknownNameError: ``where`` is neither reported nor carried.
            ArgumentTypeError: ``where`` is not boolean.
            ShapeError: ``where`` does not have the shape of the weights.
        """
        if spec.where is None:
            return self
        if not callable(spec.where) and spec.where not in self.named:
            raise errors.unknown_name(f"where of {spec.title}", spec.where, map(str, self.named))
        found = spec.where(self.named) if callable(spec.where) else self.named[spec.where]
        mask, weight = jnp.asarray(found), self.weight
        if mask.dtype != jnp.bool_:
            raise errors.ArgumentTypeError(
                f"where of {spec.title} must be boolean, got {mask.dtype}",
                fix="return a comparison such as named['y_true'] >= 0",
            )
        if weight is not None and jnp.shape(weight) != mask.shape:
            raise errors.ShapeError(
                f"where of {spec.title} must have the shape of the weights {jnp.shape(weight)}, "
                f"got {mask.shape}",
                fix="return one bool per example",
            )
        if weight is not None:
            mask = jnp.where(mask, weight, jnp.zeros((), jnp.result_type(weight)))
        return Inputs({**self.reported, "sample_weight": mask}, self.named, self.batch)

    def num_examples(self, args: PyTree) -> int:
        """Returns the length of the batch axis of the weights, the arguments or the batch."""
        for candidate in (self.weight, args, self.batch):
            found = leading_axis(candidate)
            if found is not None:
                return found
        return 1


def _as_dict(tree: PyTree) -> dict[str, PyTree]:
    return dict(tree) if isinstance(tree, Mapping) else {}


def _shape_of(leaf: PyTree) -> PyTree:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if isinstance(leaf, bool | int | float | complex):
        return jax.eval_shape(lambda: jnp.asarray(leaf))
    return leaf
