"""NNX modules, found without an import of Flax.

    has_modules((model, optimizer))         # True

If nothing has imported `flax.nnx`, nothing is an NNX module.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import jax

NNX_VARIABLES: Final = "nnx_variables"
"""The part of a carried state that holds the variables of NNX modules."""


def has_modules(tree: Any) -> bool:
    """Returns whether there are NNX modules, or other NNX objects with variables, in a pytree."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    # The variables in an `nnx.State` belong to no module: it is a plain pytree.
    stops = (nnx.Pytree, nnx.Variable, nnx.State)
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, stops))
    return any(isinstance(leaf, nnx.Pytree | nnx.Variable) for leaf in leaves)
