"""The structure of a step state that a handler changed during the run that saved it.

    like = reshaped(like, record["leaves"]["step_state"], stored, record["reshaped"])

The init function of the loop makes the structure from before the change. The record says which
leaves a handler added, removed or changed, so only those are taken from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxloop._core.types import PyTree


def reshaped(
    like: PyTree, leaves: Sequence[Sequence[Any]], stored: PyTree, changed: Sequence[str]
) -> PyTree:
    """Returns ``like`` with the leaves that a handler changed as they were saved.

    Args:
        like: The step state that the loop makes.
        leaves: ``[path, dtype, shape]`` of each saved leaf.
        stored: The saved tree in plain containers, with shapes in place of arrays.
        changed: The paths of the leaves that a handler added, removed or changed.
    """
    saved = {path: (dtype, tuple(shape)) for path, dtype, shape in leaves}
    may_differ = set(changed)

    def is_inside(prefix: str, paths: Any) -> bool:
        return any(path.startswith(prefix) for path in paths)

    def leaf_of(path: str, leaf: Any) -> Any:
        if path not in may_differ or path not in saved:
            return leaf
        dtype, shape = saved[path]
        if (str(leaf.dtype), tuple(leaf.shape)) == (dtype, shape):
            return leaf
        return jax.ShapeDtypeStruct(
            shape, jnp.dtype(dtype), sharding=getattr(leaf, "sharding", None)
        )

    def merged(mine: PyTree, there: PyTree, prefix: str) -> PyTree:
        if isinstance(mine, dict) and isinstance(there, dict):
            names = {str(name): name for name in mine}
            result = {}
            for text, name in names.items():
                place = f"{prefix}[{name!r}]"
                own = {
                    place + jax.tree_util.keystr(path)
                    for path, _ in jax.tree_util.tree_leaves_with_path(mine[name])
                }
                if own and own <= may_differ - set(saved):
                    continue  # a handler removed it
                result[name] = merged(mine[name], there.get(text), place)
            for text, one in there.items():
                if text not in names and is_inside(f"{prefix}[{text!r}]", may_differ):
                    result[text] = one
            return result
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf_of(prefix + jax.tree_util.keystr(path), leaf), mine
        )

    return merged(like, stored, "")
