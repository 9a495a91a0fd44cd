"""The mean over the last iterations of an epoch.

    loop.metric("loss", accumulate=window(100))

Invariant: the accumulator holds the weighted sum and the weight of each of these iterations, not
their total, so the mean does not drift, and a value that leaves the window leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxloop._core.checks import check_count
from jaxloop._core.types import PyTree


@dataclass(frozen=True)
class Window:
    """An ``accumulate=``: the mean over the last iterations of the epoch; see `window`.

    Attributes:
        n: The number of iterations.
    """

    n: int

    def __post_init__(self) -> None:
        check_count("n", self.n, at_least=1, where="window")
        object.__setattr__(self, "n", int(self.n))


def window(n: int) -> Window:
    """Makes an ``accumulate=`` for a metric: the mean over the last ``n`` iterations of the epoch.

    The mean is weighted like "running_average": by examples, or by the sums of their weights. It is
    exact after each iteration. The accumulator holds ``n`` sums and is carried through the compiled
    loop, so a window of many thousands of iterations costs time and memory.

    Args:
        n: The number of iterations, at least 1. Before there are as many, the mean is over all.

    Raises:
        ArgumentTypeError: ``n`` is not a whole number.
        ArgumentError: ``n`` is less than 1.

    Example:
        >>> import jaxloop as jl
        >>> loop = jl.loop(lambda batch, state: jl.emit(state, x=batch))
        >>> loop = loop.metric("x", accumulate=jl.window(2))
        >>> float(loop.run([1.0, 2.0, 6.0]).history[0]["x"])
        4.0
    """
    return Window(n)


# The accumulator is ``{"last": entries, "num": int32}``. The arrays of the entries have a first
# axis of length n. The newest entry is at its end, and what is not filled yet is zero.


def empty_entries(n: int, entry: PyTree) -> PyTree:
    """Returns an accumulator without entries.

    Args:
        n: The number of entries.
        entry: One entry, an additive accumulator of zeros.
    """
    return {
        "last": jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), entry),
        "num": jnp.zeros((), jnp.int32),
    }


def push(acc: PyTree, entry: PyTree) -> PyTree:
    """Adds an entry, and drops the oldest one."""
    last = jax.tree.map(lambda x, one: jnp.concatenate([x[1:], one[None]]), acc["last"], entry)
    return {"last": last, "num": jnp.minimum(acc["num"] + 1, _length(last))}


def merge_entries(a: PyTree, b: PyTree) -> PyTree:
    """Returns the last entries of both, where those of ``b`` are later."""
    n = _length(b["last"])
    first = n - b["num"]  # the index of the first entry of b

    def merged(x: jax.Array, y: jax.Array) -> jax.Array:
        both = jnp.concatenate([x, y])
        earlier = lax.dynamic_slice_in_dim(both, b["num"], n)
        is_of_b = jnp.arange(n, dtype=jnp.int32) >= first
        return jnp.where(is_of_b.reshape(n, *(1,) * (x.ndim - 1)), y, earlier)

    return {
        "last": jax.tree.map(merged, a["last"], b["last"]),
        "num": jnp.minimum(a["num"] + b["num"], n),
    }


def total(acc: PyTree, add: Callable[[PyTree, PyTree], PyTree]) -> PyTree:
    """Returns the sum of the entries.

    Args:
        acc: The accumulator.
        add: Adds two trees like ``acc["last"]``, entry by entry.
    """
    entries, num = acc["last"], _length(acc["last"])
    while num > 1:  # in pairs, because adding them one after the other takes n steps
        half = num // 2
        added = add(_part(entries, 0, half), _part(entries, half, 2 * half))
        odd = _part(entries, 2 * half, num)
        entries = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), added, odd)
        num -= half
    return jax.tree.map(lambda x: x[0], entries)


def _part(entries: PyTree, start: int, stop: int) -> PyTree:
    return jax.tree.map(lambda x: x[start:stop], entries)


def _length(entries: PyTree) -> int:
    return int(jax.tree.leaves(entries)[0].shape[0])
