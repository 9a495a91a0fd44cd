"""The inputs of examples of weight 0, which the model sees although they are not there.

    x = finite_where_absent(x, sample_weight)

The loss of such an example has no gradient. But 0 times the infinite or NaN derivative of the model
at such an input is NaN, and would reach the parameters. Invariant: finite inputs stay, because a
model may mix the examples of a batch, as a graph network does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop._core.types import PyTree


def finite_where_absent(x: PyTree, sample_weight: ArrayLike | None) -> PyTree:
    """Replaces NaN and infinity in the inputs of examples of weight 0.

    Each such number becomes the one at its place in the first example that has a weight, or 0 if
    that is not finite either. Integers, and arrays whose first axis is not the batch, stay. With
    weights for elements, ``(batch, time)``, an array that has these axes is replaced by element.

    Args:
        x: The inputs, a pytree of arrays.
        sample_weight: ``(batch,)`` or ``(batch, *rest)`` of bool, int or float, or None.

    Example:
        >>> x = jnp.array([[1.0], [jnp.nan]])
        >>> finite_where_absent(x, jnp.array([True, False])).tolist()
        [[1.0], [1.0]]
    """
    if sample_weight is None or jnp.ndim(sample_weight) == 0:
        return x
    present = jnp.asarray(sample_weight).astype(jnp.bool_)
    examples = present.any(axis=tuple(range(1, present.ndim)))

    def replaced(leaf: PyTree) -> PyTree:
        array = jnp.asarray(leaf)
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            return leaf
        for known in (present, examples):
            if array.shape[: known.ndim] == known.shape:
                flat = array.reshape(-1, *array.shape[known.ndim :])
                return _replaced(flat, ~known.reshape(-1)).reshape(array.shape)
        return leaf

    return jax.tree.map(replaced, x)


def _replaced(array: jax.Array, absent: jax.Array) -> jax.Array:
    first = jnp.argmin(absent)
    filler = jnp.where(jnp.isfinite(array[first]), array[first], 0)
    shaped = absent.reshape(-1, *(1,) * (array.ndim - 1))
    return jnp.where(shaped & ~jnp.isfinite(array), filler, array)
