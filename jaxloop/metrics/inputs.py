"""The values that metrics may read: a step's outputs, its state, and its batch.

    inputs = Inputs.of(outputs, step_state, batch)
    y_true, y_pred = inputs.arguments(spec)

Weights of several axes, such as one for each token, make each element an example: the arguments
whose shapes begin with the shape of the weights get one axis in place of these axes, and so do the
weights. Metrics therefore only see weights of shape ``(batch,)``.

Invariant: a value that the step reports hides a carried value of the same name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors, losses
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
    def sample_weight(self) -> ArrayLike | None:
        """The weights as the step reports them, or None."""
        return self.reported.get("sample_weight")

    @property
    def weight(self) -> ArrayLike | None:
        """The weights with one axis, ``(examples,)``, or None."""
        return self._of_examples(self.sample_weight)

    @property
    def examples(self) -> dict[str, PyTree]:
        """The outputs by name, with one axis in place of the axes of the weights."""
        return self._of_examples(self.reported)

    def _of_examples(self, values: PyTree) -> PyTree:
        weight = self.sample_weight
        return values if weight is None else losses.flattened(values, jnp.shape(weight))

    def arguments(self, spec: MetricSpec) -> tuple[PyTree, ...]:
        """Returns the arguments that a metric takes from these values.

        They have one axis in place of the axes of the weights, unless the metric is a function that
        returns one value per batch.

        Raises:
            UnknownNameError: A field is neither reported nor carried.
            ArgumentTypeError: The transform did not return a list.
        """
        args = self.selected(spec)
        return args if spec.per == "batch" else self._of_examples(args)

    def selected(self, spec: MetricSpec) -> tuple[PyTree, ...]:
        """Returns the values that a metric selects, as the step reports or carries them.

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
            ShapeError: ``where`` and the weights have shapes of which neither is the leading part
                of the other.
        """
        if spec.where is None:
            return self
        if not callable(spec.where) and spec.where not in self.named:
            raise errors.unknown_name(f"where of {spec.title}", spec.where, map(str, self.named))
        found = spec.where(self.named) if callable(spec.where) else self.named[spec.where]
        mask, weight = jnp.asarray(found), self.sample_weight
        if mask.dtype != jnp.bool_:
            raise errors.ArgumentTypeError(
                f"where of {spec.title} must be boolean, got {mask.dtype}",
                fix="return a comparison such as named['y_true'] >= 0",
            )
        if weight is not None:
            num_axes = max(1, min(mask.ndim, jnp.ndim(weight)))
            if jnp.shape(weight)[:num_axes] != mask.shape[:num_axes]:
                raise errors.ShapeError(
                    f"where of {spec.title} must have the shape of the weights "
                    f"{jnp.shape(weight)}, got {mask.shape}",
                    fix="return one bool per example",
                )
            mask, weight = _same_axes(mask, jnp.asarray(weight))
            mask = jnp.where(mask, weight, jnp.zeros((), weight.dtype))
        return self.weighted(mask)

    def weighted(self, weight: ArrayLike) -> Inputs:
        """Returns the inputs with other weights."""
        return dataclasses.replace(self, reported={**self.reported, "sample_weight": weight})

    def check_weights(self, title: str, args: PyTree, *, all_args: bool) -> None:
        """Checks that arguments have the axes of the weights, if those have several.

        Args:
            title: The metric, for the error message.
            args: The arguments, as the step reports or carries them.
            all_args: Whether all arrays must have them. Otherwise one is enough.

        Raises:
            ShapeError: They have not.
        """
        if self.sample_weight is None:
            return
        weights = jnp.shape(self.sample_weight)
        shapes = [shape for shape in map(jnp.shape, jax.tree.leaves(args)) if shape]
        if len(weights) < 2 or not shapes:
            return
        fits = [shape[: len(weights)] == weights for shape in shapes]
        if not (all(fits) if all_args else any(fits)):
            raise errors.ShapeError(
                f"{title}: weight (sample_weight or mask) must have a leading part of the shape of "
                f"the target {shapes[0]}, got {weights} for arguments of shapes "
                f"{', '.join(map(str, shapes))}",
                fix="pass weights of shape (batch,) or, for one per element, (batch, time)",
            )

    def num_examples(self, args: PyTree) -> int:
        """Returns the length of the batch axis of the weights, the arguments or the batch."""
        for candidate in (self.weight, args, self.batch):
            found = leading_axis(candidate)
            if found is not None:
                return found
        return 1


def _same_axes(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Repeats the values of the array with fewer axes along the other axes of the other one."""
    shape = a.shape if a.ndim > b.ndim else b.shape

    def repeated(one: jax.Array) -> jax.Array:
        return jnp.broadcast_to(one.reshape(one.shape + (1,) * (len(shape) - one.ndim)), shape)

    return repeated(a), repeated(b)


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
