"""The accumulators of all metrics as one vector of 32-bit words.

    packing = Packing(jax.eval_shape(metrics.init), added)
    packed = packing.pack(metrics.init())
    packed = packing.add(packed, deltas, others)
    accs = packing.unpack(packed)

XLA's CPU backend runs one kernel after another, so a few operations on a vector cost far less than
the same on many scalars. The words of all sums come first: each ``hi`` of a `Pair`, each ``lo``,
then `ExactInt` limb by limb, then flags. One addition therefore serves the sums of all metrics.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxloop._core.types import PyTree
from jaxloop.metrics.accumulators import cast_like
from jaxloop.metrics.sums import (
    checked_nodes,
    is_node,
    merge_sums,
    node_of,
    nodes_of,
    parts_of,
    sums_together,
)
from jaxloop.metrics.words import from_words, has_words, num_words, to_words

Packed: TypeAlias = list[jax.Array]
"""The vector, and after it each array that has no words, such as a typed key. It is empty if there
is nothing to accumulate."""


class _Place(NamedTuple):
    """The words of one array."""

    start: int
    shape: tuple[int, ...]
    dtype: Any

    @property
    def stop(self) -> int:
        """The first word after it."""
        return self.start + num_words(self.shape, self.dtype)

    def read(self, vector: jax.Array) -> jax.Array:
        """Returns the array."""
        return from_words(vector[self.start : self.stop], self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class _Group:
    """The nodes of one kind, which are added as one node of vectors.

    Attributes:
        indices: Which nodes they are, in the order of their words.
        fields: The words of each part of the nodes: hi and lo, or the limbs, or the flag.
    """

    indices: list[int]
    fields: list[_Place]


class Packing:
    """The places of accumulators in a vector.

    Args:
        like: The accumulators of each metric by name, or their shapes.
        sums: The names of the metrics whose accumulators are sums; see `jaxloop.metrics.sums`.
    """

    def __init__(self, like: Mapping[str, PyTree], sums: Collection[str]) -> None:
        self._like = dict(like)
        # Sorted, so that a script that declares them in another order can go on with a state.
        self._sums = sorted(name for name in like if name in sums)
        self._others = {name: acc for name, acc in like.items() if name not in sums}
        self._nodes: list[Any] = []
        paths = []
        for name in self._sums:
            for path, node in jax.tree_util.tree_leaves_with_path(like[name], is_leaf=is_node):
                self._nodes.append(node)
                paths.append(jax.tree_util.keystr(path))
        self._groups: list[_Group] = []
        end = 0
        for indices in _by_kind(paths, self._nodes):
            length = sum(_size(self._nodes[index]) for index in indices)
            fields = []
            for part in parts_of(self._nodes[indices[0]]):
                fields.append(_Place(end, (length,), part.dtype))
                end = fields[-1].stop
            self._groups.append(_Group(indices, fields))
        leaves, self._structure = jax.tree.flatten(self._others)
        self._places: list[_Place | int] = []  # an int is the index of an array without words
        for leaf in leaves:
            if has_words(leaf.dtype):
                place = _Place(end, tuple(leaf.shape), leaf.dtype)
                self._places.append(place)
                end = place.stop
            else:
                self._places.append(1 + sum(isinstance(place, int) for place in self._places))
        self._num_words, self._is_empty = end, not self._nodes and not leaves

    def pack(self, accs: Mapping[str, PyTree]) -> Packed:
        """Returns the accumulators as a vector."""
        nodes = [jax.tree.map(jnp.ravel, node) for node in self._nodes_of(accs)]
        return self._packed(
            [_joined([nodes[index] for index in group.indices]) for group in self._groups], accs
        )

    def restored(self, saved: Sequence[jax.Array], *, by_dtype: bool) -> Packed | None:
        """Returns saved accumulators, or None if they do not fit.

        Args:
            saved: The arrays.
            by_dtype: Whether they are of format 3 or earlier, which has one vector for each dtype,
                and its parts in the order of the metrics' names. Shapes do not tell, because exact
                integers have the dtype of the words.
        """
        if not by_dtype:
            shapes = jax.eval_shape(self.pack, self._like)
            return list(saved) if _shapes_of(saved) == _shapes_of(shapes) else None
        leaves, structure = jax.tree.flatten(self._like)
        groups: dict[Any, list[int]] = {}
        for index, leaf in enumerate(leaves):
            groups.setdefault(leaf.dtype, []).append(index)
        sizes = [sum(math.prod(leaves[i].shape) for i in group) for group in groups.values()]
        if _shapes_of(saved) != [((size,), d) for size, d in zip(sizes, groups, strict=True)]:
            return None
        for vector, group in zip(saved, groups.values(), strict=True):
            low = 0
            for index in group:
                shape = leaves[index].shape
                high = low + math.prod(shape)
                leaves[index] = vector[low:high].reshape(shape)
                low = high
        return self.pack(jax.tree.unflatten(structure, leaves))

    def unpack(self, packed: Packed) -> dict[str, PyTree]:
        """Returns the accumulators of each metric by name."""
        nodes = list(self._nodes)
        for group in self._groups:
            columns = [field.read(packed[0]) for field in group.fields]
            low = 0
            for index in group.indices:
                like, high = nodes[index], low + _size(nodes[index])
                shape = parts_of(like)[0].shape
                nodes[index] = node_of([c[low:high].reshape(shape) for c in columns], like)
                low = high
        accs, rest = self.others(packed), iter(nodes)
        for name in self._sums:
            structure = nodes_of(self._like[name])[1]
            mine = itertools.islice(rest, structure.num_leaves)
            accs[name] = jax.tree.unflatten(structure, mine)
        return {name: accs[name] for name in self._like}

    def others(self, packed: Packed) -> dict[str, PyTree]:
        """Returns the accumulators that are not sums."""
        leaves = [
            packed[place] if isinstance(place, int) else place.read(packed[0])
            for place in self._places
        ]
        accs: dict[str, PyTree] = jax.tree.unflatten(self._structure, leaves)
        return accs

    def add(
        self, packed: Packed, deltas: Mapping[str, PyTree], others: Mapping[str, PyTree]
    ) -> Packed:
        """Adds a batch.

        Args:
            packed: The accumulators.
            deltas: What the batch adds to those that are sums, possibly with `Examples`.
            others: The new accumulators that are not sums.

        Raises:
            ShapeError: One has another structure, shape or dtype than the accumulator.
        """
        nodes = [
            node
            for name in self._sums
            for node in checked_nodes(name, deltas[name], self._like[name])
        ]
        sums = []
        for group in self._groups:
            mine = sums_together(
                [nodes[index] for index in group.indices],
                [self._nodes[index] for index in group.indices],
            )
            delta = _joined(mine)
            old = node_of([field.read(packed[0]) for field in group.fields], delta)
            sums.append(merge_sums(old, delta))
        return self._packed(
            sums, {name: cast_like(name, others[name], acc) for name, acc in self._others.items()}
        )

    def kept(self, condition: jax.Array, old: Packed, new: Packed, *, but: str) -> Packed:
        """Returns ``old`` where a condition holds, else ``new``. One metric is always new."""
        if self._is_empty:
            return new
        mine, zeros = (
            self.unpack([jnp.full(self._num_words, bits, jnp.uint32), *new[1:]])
            for bits in (2**32 - 1, 0)
        )
        is_mine = self.pack({**zeros, **{n: acc for n, acc in mine.items() if n == but}})[0] != 0
        vector = jnp.where(condition & ~is_mine, old[0], new[0])
        rest = [jnp.where(condition, a, b) for a, b in zip(old[1:], new[1:], strict=True)]
        return [vector, *rest]

    def _nodes_of(self, accs: Mapping[str, PyTree]) -> list[Any]:
        return [node for name in self._sums for node in nodes_of(accs[name])[0]]

    def _packed(self, sums: Sequence[Any], accs: Mapping[str, PyTree]) -> Packed:
        if self._is_empty:
            return []
        leaves = jax.tree.leaves({name: accs[name] for name in self._others})
        words = [to_words(part) for node in sums for part in parts_of(node)]
        words += [to_words(leaf) for leaf in leaves if has_words(leaf.dtype)]
        vector = jnp.concatenate(words) if words else jnp.zeros(0, jnp.uint32)
        return [vector, *(leaf for leaf in leaves if not has_words(leaf.dtype))]


def _by_kind(paths: Sequence[str], nodes: Sequence[Any]) -> list[list[int]]:
    """Returns the indices of the nodes that are added together, in the order of their words.

    Nodes of one path are neighbours, such as the sums of all means, because their examples can
    often be summed at once. The order depends on nothing but the accumulators.
    """
    groups: dict[tuple[str, int, str], list[int]] = {}
    for index in sorted(range(len(nodes)), key=lambda index: paths[index]):
        parts = parts_of(nodes[index])
        kind = (type(nodes[index]).__name__, len(parts), str(parts[0].dtype))
        groups.setdefault(kind, []).append(index)
    return [groups[kind] for kind in sorted(groups)]


def _shapes_of(arrays: Sequence[Any]) -> list[tuple[tuple[int, ...], Any]]:
    return [(tuple(one.shape), one.dtype) for one in arrays]


def _size(node: Any) -> int:
    return math.prod(parts_of(node)[0].shape)


def _joined(nodes: Sequence[Any]) -> Any:
    """Returns nodes of vectors as one."""
    if len(nodes) == 1:
        return nodes[0]
    columns = zip(*map(parts_of, nodes), strict=True)
    return node_of([jnp.concatenate(column) for column in columns], nodes[0])
