"""The batches of a compiled block, as pytrees that return the batch of a row.

    Stacked(stack).row(3)                               # of a stack with a leading axis
    Gathered(arrays, order, 32, 1437, False).row(3)     # gathered from arrays on the device

``row`` is traced inside the block, so its index may be a tracer.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxloop._core.types import PyTree
from jaxloop._data.padding import marked


class Rows(Protocol):
    """Batches on the device, indexed by row."""

    def row(self, index: Any) -> PyTree:
        """Returns the batch at ``index``, an int32 scalar that may be a tracer."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Single:
    """One batch, the same at every row."""

    value: PyTree

    def row(self, index: Any) -> PyTree:
        """Returns the batch."""
        del index
        return self.value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """Batches of one signature with a leading axis. Unfilled rows are never read."""

    value: PyTree

    def row(self, index: Any) -> PyTree:
        """Returns the batch at ``index``."""
        return jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), self.value
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gathered:
    """The batches of one epoch, gathered from arrays that are on the device.

    ``order`` is an int32 array of shape ``(1, num_examples)``, or None if the arrays are already in
    the order of the epoch. They may then end after the last batch that is needed.
    """

    arrays: PyTree
    order: Any
    batch_size: int = dataclasses.field(metadata={"static": True})
    num_examples: int = dataclasses.field(metadata={"static": True})
    pad: bool = dataclasses.field(metadata={"static": True})
    first: int = dataclasses.field(default=0, metadata={"static": True})

    def row(self, index: Any) -> PyTree:
        """Returns the batch at ``index``, with padding and a mask if ``pad`` is set."""
        size, num_examples = self.batch_size, self.num_examples
        held = jax.tree.leaves(self.arrays)[0].shape[0]
        low = index * jnp.int32(size)
        if self.first:
            low += jnp.int32(self.first)
        if self.order is None and not self.pad:
            return self._slice(low)
        places = low + jnp.arange(size, dtype=jnp.int32)
        where = jnp.minimum(places, jnp.int32(num_examples - 1))
        if self.order is not None:
            batch = take_examples(self.arrays, self.order.reshape(-1)[where])
        elif size <= held:
            # XLA on CPU runs a gather from a large array on several threads, which is slower.
            first = jnp.minimum(low, jnp.int32(held - size))
            batch = take_examples(self._slice(first), where - first)
        else:
            batch = take_examples(self.arrays, where)
        return marked(batch, places < jnp.int32(num_examples)) if self.pad else batch

    def _slice(self, low: Any) -> PyTree:
        return jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, low, self.batch_size), self.arrays
        )


def take_examples(arrays: PyTree, where: Any) -> PyTree:
    """Returns these examples of each array."""
    return jax.tree.map(lambda x: jnp.take(x, where, axis=0, mode="clip"), arrays)
