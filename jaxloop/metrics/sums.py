"""Accumulators that are sums: what one batch adds, and how it is added.

    delta = {"sum": Examples(values, weight), "weight": sum_weights(weight, len(values))}
    acc = merge_sums(acc, summed(delta, like=acc))

A metric whose accumulator is a sum returns only what its batch adds. The metrics of a loop then sum
the examples of all of them in a few vector operations, and add all sums in one. Invariant: the
nodes of such an accumulator are `Pair`, `ExactInt` and bool arrays, and a bool is true from the
first batch on in which it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxloop._core.types import PyTree
from jaxloop.errors import ShapeError
from jaxloop.metrics.accumulators import cast_like, check_structure
from jaxloop.metrics.exact_int import ExactInt, add_ints, sum_ints
from jaxloop.metrics.exact_sum import Pair, add_pairs, float_dtype, sum_examples

_EXACT_BOOLS = 2**20


class Examples(NamedTuple):
    """The values of the examples in a batch, which are not summed yet.

    Attributes:
        values: ``(batch, *rest)``, any real dtype.
        weight: ``(batch,)`` or None.
    """

    values: jax.Array
    weight: jax.Array | None


def is_node(value: object) -> bool:
    """Returns whether a value is a node that is added as a whole."""
    return isinstance(value, Pair | ExactInt | Examples)


def nodes_of(tree: PyTree) -> tuple[list[Any], Any]:
    """Flattens a tree of sums down to its nodes, and returns them with its structure."""
    return jax.tree.flatten(tree, is_leaf=is_node)


def merge_sums(a: PyTree, b: PyTree) -> PyTree:
    """Adds two trees of sums, node by node."""
    return jax.tree.map(_add, a, b, is_leaf=is_node)


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, Pair):
        return add_pairs(a, b)
    return add_ints(a, b) if isinstance(a, ExactInt) else a | b


def summed(delta: PyTree, like: PyTree) -> PyTree:
    """Returns a delta with the sum of its examples in place of each `Examples`.

    Args:
        delta: What a batch adds.
        like: An accumulator, or its shapes. A sum is a `Pair` or an `ExactInt` as it is there.
    """
    nodes, structure = nodes_of(delta)
    sums = [
        _sum(node, old) if isinstance(node, Examples) else node
        for node, old in zip(nodes, nodes_of(like)[0], strict=True)
    ]
    return jax.tree.unflatten(structure, sums)


def checked_nodes(name: str, delta: PyTree, acc: PyTree) -> list[Any]:
    """Returns the nodes of a delta, in the dtypes of the accumulator.

    Args:
        name: The metric, for the error message.
        delta: What a batch adds.
        acc: The accumulator, or its shapes.

    Raises:
        ShapeError: The delta cannot be added to the accumulator.
    """
    nodes, structure = nodes_of(delta)
    olds, expected = nodes_of(acc)
    check_structure(name, structure, expected)
    return [_checked(name, node, old) for node, old in zip(nodes, olds, strict=True)]


def _checked(name: str, node: Any, old: Any) -> Any:
    if not isinstance(node, Examples):
        return cast_like(name, node, old)
    shape, expected = node.values.shape[1:], parts_of(old)[0].shape
    if shape != expected or not isinstance(old, Pair | ExactInt):
        raise ShapeError(
            f"metric {name!r}: the sum of the examples must have shape {expected}, got {shape}",
            fix="return values of shape (batch, *rest) with the same rest for every batch",
        )
    return node


def sums_together(nodes: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """Returns the sums of some nodes, where examples of one shape and weight are summed at once.

    Args:
        nodes: The nodes of deltas.
        like: The nodes of their accumulators.

    Returns:
        Nodes of vectors, in order. One may hold the sums of several neighbours.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, (node, old) in enumerate(zip(nodes, like, strict=True)):
        groups.setdefault(_group_of(index, node, old), []).append(index)
    totals: dict[int, tuple[Any, int, int]] = {}  # a vector, the place of a node's sum, the length
    for indices in groups.values():
        one, old = nodes[indices[0]], like[indices[0]]
        if len(indices) > 1:
            columns = [_addable(nodes[index].values, old) for index in indices]
            one = Examples(jnp.stack(columns, axis=-1), one.weight)
        total = _sum(one, old) if isinstance(one, Examples) else one
        total = jax.tree.map(jnp.ravel, total)
        totals |= {index: (total, place, len(indices)) for place, index in enumerate(indices)}

    def run_of(index: int) -> Hashable:
        total, place, _ = totals[index]
        return id(total), place - index

    sums = []
    for _, run in itertools.groupby(range(len(nodes)), run_of):
        (total, low, length), *more = (totals[index] for index in run)
        high = low + 1 + len(more)
        whole = high - low == length
        sums.append(total if whole else jax.tree.map(lambda x, a=low, b=high: x[a:b], total))
    return sums


def _group_of(index: int, node: Any, old: Any) -> Hashable:
    if not isinstance(node, Examples) or node.values.ndim != 1:
        return index  # there is nothing to sum, or so much that nothing is gained
    dtype = node.values.dtype
    num_limbs = len(old.limbs) if isinstance(old, ExactInt) else 0
    if not num_limbs and (jnp.issubdtype(dtype, jnp.floating) or _is_small(node.values)):
        dtype = float_dtype()
    return num_limbs, node.values.shape, dtype, id(node.weight)


def _is_small(values: jax.Array) -> bool:
    # The sum of so many bools is exact in floats too.
    return bool(values.dtype == jnp.bool_) and values.shape[0] <= _EXACT_BOOLS


def _addable(values: jax.Array, old: Any) -> jax.Array:
    return values if isinstance(old, ExactInt) else values.astype(float_dtype())


def _sum(examples: Examples, old: Any) -> Pair | ExactInt:
    if isinstance(old, ExactInt):
        return sum_ints(examples.values, examples.weight, len(old.limbs))
    return sum_examples(examples.values, examples.weight)


def parts_of(node: Any) -> Sequence[Any]:
    """Returns the arrays of a node, which have one shape and dtype."""
    if isinstance(node, Pair):
        return node.hi, node.lo
    return node.limbs if isinstance(node, ExactInt) else (node,)


def node_of(parts: Sequence[Any], like: Any) -> Any:
    """Returns a node of the kind of ``like``."""
    if isinstance(like, Pair):
        return Pair(*parts)
    return ExactInt(tuple(parts)) if isinstance(like, ExactInt) else parts[0]
