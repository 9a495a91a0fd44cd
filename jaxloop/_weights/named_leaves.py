"""The arrays of a model by name, whichever framework it is from.

    leaves = NamedLeaves.of(variables)
    leaves.names                            # ("params.Dense_0.bias", "params.Dense_0.kernel")
    variables = leaves.replaced(new_arrays)

Invariant: names are those by which the user of the model knows its parts, joined by dots. They say
nothing of how the framework stores an array, so an NNX module and its state have the same names.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentError, ArgumentTypeError

ROOT_NAME = "value"
"""The name of an array that is no part of anything."""


@dataclasses.dataclass(frozen=True)
class NamedLeaves:
    """The arrays of a model.

    Attributes:
        names: The name of each.
        values: The arrays, or numbers, or shapes.
        replaced: Returns a model like the first with other values.
    """

    names: tuple[str, ...]
    values: tuple[Any, ...]
    replaced: Callable[[Sequence[Any]], PyTree]

    @classmethod
    def of(cls, model: PyTree, where: str) -> NamedLeaves:
        """Returns the arrays of a model.

        Args:
            model: A pytree of arrays, which may hold modules of NNX and Equinox, or a `State`.
            where: The function of the user, for errors.

        Raises:
            ArgumentTypeError: A leaf is no array.
            ArgumentError: There are none, or two have one name.
        """
        if isinstance(model, State):
            return _of_state(model, where)
        opened, close = _opened(model)
        tree: Any
        nodes, tree = jax.tree_util.tree_flatten_with_path(opened, is_leaf=_is_variable)
        # A variable of NNX may itself hold several arrays.
        inner: Any = [jax.tree_util.tree_flatten_with_path(node) for _, node in nodes]
        paths, values = [], []
        for (path, node), (leaves, _) in zip(nodes, inner, strict=True):
            for below, value in leaves:
                paths.append((*path, *(below[1:] if _is_variable(node) else below)))
                values.append(value)
        names = [".".join(map(_key, path)) if path else ROOT_NAME for path in paths]
        _check(names, values, where)

        def replaced(new: Sequence[Any]) -> PyTree:
            rest = iter(new)
            made = [t.unflatten([next(rest) for _ in leaves]) for leaves, t in inner]
            return close(tree.unflatten(made))

        return cls(tuple(names), tuple(values), replaced)


def _of_state(state: State[Any], where: str) -> NamedLeaves:
    """Returns the arrays of the model in the state of a loop, or all of its step state."""
    step_state = state.step_state
    if not isinstance(step_state, dict) or "model_state" not in step_state:
        leaves = NamedLeaves.of(step_state, where)
        return dataclasses.replace(
            leaves, replaced=lambda new: state.replace(step_state=leaves.replaced(new))
        )
    leaves = NamedLeaves.of(step_state["model_state"], where)

    def replaced(new: Sequence[Any]) -> State[Any]:
        return state.replace(step_state={**step_state, "model_state": leaves.replaced(new)})

    return dataclasses.replace(leaves, replaced=replaced)


def _opened(model: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Returns a model with a pytree of arrays in place of each module, and how to undo it."""
    tree: Any
    parts, tree = jax.tree.flatten(model, is_leaf=_is_module)
    pairs = [_opened_module(part) for part in parts]
    opened = tree.unflatten([pair[0] for pair in pairs])

    def close(new: PyTree) -> PyTree:
        return tree.unflatten(
            [pair[1](one) for pair, one in zip(pairs, tree.flatten_up_to(new), strict=True)]
        )

    return opened, close


def _opened_module(part: Any) -> tuple[PyTree, Callable[[PyTree], Any]]:
    nnx, equinox = sys.modules.get("flax.nnx"), sys.modules.get("equinox")
    if nnx is not None and isinstance(part, nnx.Module):
        graph, state = nnx.split(part)
        return state, lambda new: nnx.merge(graph, new, copy=True)
    if equinox is not None and isinstance(part, equinox.Module):
        arrays, static = equinox.partition(part, _is_array)
        return arrays, lambda new: equinox.combine(new, static)
    return part, lambda new: new


def _is_module(node: Any) -> bool:
    # A framework that nobody imported has made no module.
    nnx, equinox = sys.modules.get("flax.nnx"), sys.modules.get("equinox")
    return (nnx is not None and isinstance(node, nnx.Module)) or (
        equinox is not None and isinstance(node, equinox.Module)
    )


def _is_variable(node: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _key(key: Any) -> str:
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)


def _check(names: list[str], values: list[Any], where: str) -> None:
    if not names:
        raise ArgumentError(
            f"{where}: the weights must have an array, got none",
            fix="pass what the trainer returned, such as the variables of a Linen module",
        )
    seen: set[str] = set()
    for name, value in zip(names, values, strict=True):
        if name in seen or name == "__metadata__":
            raise ArgumentError(
                f"{where}: each array must have a name of its own, got {name!r} "
                f"{'twice' if name in seen else 'which the format uses itself'}",
                fix="rename a part; the names of the parts of an array are joined by dots",
            )
        seen.add(name)
        if not (_is_array(value) or isinstance(value, bool | int | float)):
            raise ArgumentTypeError(
                f"{where}: {name!r} must be an array, got {type(value).__name__} {value!r:.60}",
                fix="pass the weights of a model alone",
            )
