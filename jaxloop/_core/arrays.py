"""Pytrees of arrays: shapes, strong types, copies, and checks of a step's state."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxloop._core.batch import Signature
from jaxloop._core.types import PyTree
from jaxloop.errors import StructureError


def structure(tree: PyTree) -> Any:
    """The tree's structure; JAX's stubs do not know that two can be compared."""
    return jax.tree.structure(tree)


def abstract(tree: PyTree) -> PyTree:
    """Shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def state_signature(tree: PyTree) -> Signature:
    """The structure, shapes and dtypes of a step state."""
    leaves, tree_structure = jax.tree.flatten(tree)
    return Signature(tree_structure, tuple((x.shape, x.dtype) for x in leaves))


def as_state(tree: PyTree, where: str) -> PyTree:
    """A step state's leaves as strongly typed arrays; Python numbers get JAX's default dtypes.

    Arrays of NumPy are put on the device together, by one explicit transfer.

    Raises:
        StructureError: A leaf is not a number or an array; the error names it.
    """

    def one(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return strong(leaf)
        try:
            dtype = jax.dtypes.canonicalize_dtype(jax.dtypes.result_type(leaf))
            return np.asarray(leaf, dtype)
        except (TypeError, ValueError):
            raise StructureError(
                f"{where}: the leaf step_state{jax.tree_util.keystr(path)} is not an array but "
                f"{type(leaf).__name__} {leaf!r:.80}",
                fix="carry arrays and numbers alone; close the step over everything else",
            ) from None

    return put(jax.tree_util.tree_map_with_path(one, tree))


def put(tree: PyTree) -> PyTree:
    """The tree with NumPy arrays put on the device, by one explicit transfer."""
    leaves, tree_structure = jax.tree.flatten(tree)
    where = [i for i, x in enumerate(leaves) if isinstance(x, np.ndarray | np.generic)]
    for i, array in zip(where, jax.device_put([leaves[i] for i in where]), strict=True):
        leaves[i] = array
    return jax.tree.unflatten(tree_structure, leaves)


def strong(array: jax.Array) -> jax.Array:
    """The array without a weak type, which would cost a second compilation."""
    weak = getattr(array, "weak_type", False)  # typed keys have no such attribute
    return lax.convert_element_type(array, array.dtype) if weak else array


def as_array(leaf: Any) -> jax.Array:
    """The leaf as an array; typed keys and tracers pass as they are."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


@functools.partial(jax.jit, inline=True)
def copy(tree: PyTree) -> PyTree:
    """New buffers for every leaf, in one dispatch; also where two leaves were one buffer."""
    return jax.tree.map(jnp.copy, tree)


def checked_state(new: PyTree, old: PyTree) -> PyTree:
    """The state that a step returned, if it has the structure, shapes and dtypes of the last.

    Raises:
        StructureError: It has not; the error names the leaf, what was and what came.
    """
    fix = (
        "return a state of the same structure, shapes and dtypes; report what the next step does "
        "not need with jl.emit(next_state, name=value)"
    )
    if structure(new) != structure(old):
        mine = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(new)}
        was = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(old)}
        parts = [f"new leaves {sorted(mine - was)}"] * bool(mine - was)
        parts += [f"missing leaves {sorted(was - mine)}"] * bool(was - mine)
        what = ", ".join(parts) or f"{jax.tree.structure(old)} became {jax.tree.structure(new)}"
        raise StructureError(f"the step changed the structure of its state: {what}", fix=fix)

    def one(path: Any, a: Any, b: Any) -> Any:
        python = isinstance(a, bool | int | float | complex)
        array = jnp.asarray(a, b.dtype) if python else as_array(a)
        if array.shape != b.shape or array.dtype != b.dtype:
            raise StructureError(
                f"the step changed its state: step_state{jax.tree_util.keystr(path)} was "
                f"{b.dtype}{list(b.shape)} and became {array.dtype}{list(array.shape)}",
                fix=fix,
            )
        return strong(array)

    return jax.tree_util.tree_map_with_path(one, new, old)


def size_bytes(tree: PyTree) -> int:
    return sum(
        int(np.prod(x.shape)) * getattr(x.dtype, "itemsize", 8) for x in jax.tree.leaves(tree)
    )
