"""Accumulators that a compiled loop can carry: the same structure, shapes and dtypes every time.

    acc = strongly_typed(metric.init())
    acc = cast_like("accuracy", metric.update(acc, y_true, y_pred), acc)

Invariant: after any number of updates, an accumulator has the shapes and dtypes that it had
at the start.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop._core.types import PyTree


def strongly_typed(tree: PyTree) -> PyTree:
    """Returns arrays without weak types, because the carry of a loop must keep its types."""

    def strong(leaf: ArrayLike) -> jax.Array:
        array = jnp.asarray(leaf)
        return lax.convert_element_type(array, array.dtype)

    return jax.tree.map(strong, tree)


def cast_like(name: str, new: PyTree, old: PyTree) -> PyTree:
    """Returns ``new`` in the dtypes of ``old``.

    Args:
        name: The metric, for the error message.
        new: An accumulator after an update or a merge.
        old: The accumulator before it.

    Raises:
        ShapeError: The structure or a shape changed, or an integer became a float.
    """
    check_structure(name, jax.tree.structure(new), jax.tree.structure(old))

    def cast(new_leaf: ArrayLike, old_leaf: jax.Array) -> jax.Array:
        array, dtype = jnp.asarray(new_leaf), old_leaf.dtype
        narrowed = jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(
            dtype, jnp.floating
        )
        if array.shape != old_leaf.shape or narrowed:
            raise errors.ShapeError(
                f"metric {name!r}: the accumulator must stay {dtype}{list(old_leaf.shape)}, got "
                f"{array.dtype}{list(array.shape)}",
                fix="return the shape and dtype of init, for batches of every size",
            )
        return lax.convert_element_type(array, dtype)

    return jax.tree.map(cast, new, old)


def check_structure(name: str, new: object, old: object) -> None:
    """Raises if the structure of a metric's accumulator changed.

    Raises:
        ShapeError: It did.
    """
    if structures_differ(new, old):
        raise errors.ShapeError(
            f"metric {name!r}: the accumulator must keep its structure {old}, got {new}",
            fix="return from update and merge the structure that init returns",
        )


def structures_differ(a: object, b: object) -> bool:
    """Returns whether two tree structures differ (JAX's own `!=` has no type)."""
    return bool(a != b)
