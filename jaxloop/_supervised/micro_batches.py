"""Micro-batches: the loss and the gradients of a large batch, a part of it at a time.

    gradient = accumulated(forward, 4)
    (_, (judged, rest)), grads = gradient(params, rest, batch, key)

Invariant: each part counts by its weight, so the result is that of the large batch up to rounding,
unless the model mixes examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxloop._core.arrays import at_least_float32
from jaxloop._core.types import PyTree
from jaxloop._supervised.criterion import Judged
from jaxloop.errors import DataError, ShapeError
from jaxloop.metrics.weights import leading_axis

ForwardFn: TypeAlias = Callable[..., tuple[jax.Array, tuple[Judged, PyTree]]]
"""``(params, rest, batch, key) -> (scaled loss, (judged, rest))``."""

GradientFn: TypeAlias = Callable[..., tuple[tuple[Any, tuple[Judged, PyTree]], PyTree]]
"""``(params, rest, batch, key) -> ((scaled loss, (judged, rest)), gradients)``."""


def accumulated(forward: ForwardFn, num_micro_batches: int) -> GradientFn:
    """Returns the gradient of ``forward``, computed over parts of the batch.

    Args:
        forward: The forward pass of a batch of any size.
        num_micro_batches: The number of parts. If the length of the batch is no multiple of it, the
            last parts are smaller or missing.
    """
    gradient = jax.value_and_grad(forward, has_aux=True)
    if num_micro_batches == 1:
        return gradient

    def of_batch(params: PyTree, rest: PyTree, batch: PyTree, key: jax.Array) -> Any:
        length = _common_length(batch)
        size = -(-length // num_micro_batches)
        num_stacked = length // size * size

        def of_part(rest: PyTree, part: PyTree, index: Any) -> tuple[PyTree, PyTree, PyTree]:
            part_key = jax.random.fold_in(key, index)
            (_, (judged, rest)), grads = gradient(params, rest, part, part_key)
            means, counts, arrays = _by_kind(judged.outputs, leading_axis(part))
            totals = jax.tree.map(lambda x: _times(x, judged.amount), (grads, means))
            return rest, (judged.amount, *totals, counts), arrays

        def add(carry: Any, part: PyTree) -> tuple[Any, PyTree]:
            rest, sums, index = carry
            rest, new, arrays = of_part(rest, part, index)
            return (rest, jax.tree.map(jnp.add, sums, new), index + 1), arrays

        stack = jax.tree.map(lambda x: x[:num_stacked].reshape(-1, size, *x.shape[1:]), batch)
        first = jax.tree.map(lambda x: x[0], stack)
        index = jnp.uint32(0)
        sums = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, rest, first, index)[1]
        )
        carry, stacked = jax.lax.scan(add, (rest, sums, index), stack)
        arrays = [jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)]
        if num_stacked < length:
            carry, last = add(carry, jax.tree.map(lambda x: x[num_stacked:], batch))
            arrays.append(last)
        rest, (amount, grads, means, counts), _ = carry

        def mean(total: jax.Array) -> jax.Array:
            return total / jnp.where(amount == 0, 1, amount).astype(total.dtype)

        means = jax.tree.map(mean, means)
        grads = jax.tree.map(lambda g, p: mean(g).astype(p.dtype), grads, params)
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *arrays)
        judged = Judged(means["loss"], amount, {**joined, **counts, **means})
        return (None, (judged, rest)), grads

    return of_batch


def _common_length(batch: PyTree) -> int:
    """Returns the length of the first axis, which all arrays of the batch must share.

    Raises:
        DataError: The arrays have no common first axis.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    lengths = {shape[0] if shape else None for shape in shapes}
    length = lengths.pop() if len(lengths) == 1 else None
    if not length:
        raise DataError(
            "accumulate_gradients must split a batch whose arrays share their first axis, got "
            f"shapes {', '.join(map(str, shapes)) or 'of no array'}",
            fix="pass arrays with a leading batch axis, or leave out accumulate_gradients",
        )
    return length


def _times(mean: jax.Array, amount: jax.Array) -> jax.Array:
    """Returns the total in float32 or wider. That of no examples is 0, even if the mean is NaN."""
    wide = at_least_float32(mean)
    return jnp.where(amount == 0, 0, wide * amount.astype(wide.dtype))


def _by_kind(
    outputs: dict[str, PyTree], length: int | None
) -> tuple[dict[str, PyTree], dict[str, PyTree], dict[str, PyTree]]:
    """Returns what a part reports as ``(means, counts, arrays with a value per example)``.

    Raises:
        ShapeError: A value is none of these.
    """
    means: dict[str, PyTree] = {}
    counts: dict[str, PyTree] = {}
    arrays: dict[str, PyTree] = {}
    for name, value in outputs.items():
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(value)]
        value = jax.tree.map(jnp.asarray, value)
        if all(leaf.ndim and leaf.shape[0] == length for leaf in leaves):
            arrays[name] = value
        elif all(not leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
            means[name] = value
        elif all(not leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in leaves):
            counts[name] = value
        else:
            shapes = ", ".join(str(leaf.shape) for leaf in leaves)
            raise ShapeError(
                f"with accumulate_gradients, the reported value {name!r} must be a scalar or have "
                f"one value per example, got shape {shapes} for {length} examples",
                fix="report scalars, which are averaged (integers are summed), or one value per "
                "example",
            )
    return means, counts, arrays
