"""The sizes of compiled blocks, in iterations, and of superbatches, in batches.

    capacity = capacity_of(jaxpr, batch, accumulators, fuse="auto", platform="cpu")
    num_rows = rows_of(capacity, batch)
    lengths = static_lengths("cuda", capacity)

They depend only on the jaxpr, the platform and the sizes of arrays, and never on a clock, so two
runs of one program never differ.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxloop._core.arrays import size_bytes
from jaxloop._core.jaxprs import equations
from jaxloop._core.types import Fuse, PyTree

_CAPACITIES = (1024, 256, 64, 32, 16, 8, 4, 2)
"""The possible capacities of a block. The largest that fits is used."""
_NO_DATA_CAPACITY = 4096
"""The capacity for steps without data, where only the ring of accumulators needs memory."""
_UNBOUNDED = 2**30
"""The capacity for steps without data and metrics, where nothing needs memory."""
_SUPERBATCH_BYTES, _RING_BYTES = 4 * 2**20, 4 * 2**20
"""The maximum sizes of a superbatch and of a ring of accumulators. More does not fit in the caches
of a CPU, and steps on such large batches are so slow that a block of a few takes long."""
_ROWS_UNFUSED = 16
"""The number of batches that are put on the device together if steps are not fused."""
_USUAL_CAPACITY = 64
_LARGE_BYTES = 2**20
"""The maximum size of superbatch and ring together above the usual capacity."""

_WAITING = ("cuda", "rocm", "gpu")
"""Platforms on which XLA copies the condition of a loop to the host, and waits for it, in each
iteration, unless the number of iterations is a constant (``WhileThunk`` in XLA's source)."""
_STATIC_LENGTHS = (64, 8)
"""The constant lengths of blocks on these platforms, besides the capacity itself."""
_MOST_STATIC = 4096
"""The maximum constant length. A longer block gains nothing and could hold up logs."""

_SLOW_IN_CPU_LOOPS = ("conv_general_dilated",)
"""Primitives whose gradients XLA runs an order of magnitude slower inside a loop on CPU."""


def capacity_of(jaxpr: Any, batch: PyTree, accumulators: PyTree, fuse: Fuse, platform: str) -> int:
    """Returns the capacity of a block. If 1, the step runs alone, outside any loop."""
    if isinstance(fuse, int):
        return fuse
    if platform == "cpu" and _is_slow_in_a_loop(jaxpr):
        return 1
    row, ring = size_bytes(batch), size_bytes(accumulators)
    if not jax.tree.leaves(batch):
        return max(2, min(_NO_DATA_CAPACITY, _RING_BYTES // ring)) if ring else _UNBOUNDED
    for capacity in _CAPACITIES:
        if capacity > _USUAL_CAPACITY and capacity * (row + ring) > _LARGE_BYTES:
            continue
        if capacity * row <= _SUPERBATCH_BYTES and capacity * ring <= _RING_BYTES:
            return capacity
    return 1


def static_lengths(platform: str, capacity: int) -> tuple[int, ...]:
    """Returns the lengths of the blocks that are compiled with a constant bound, the longest first.

    All other lengths use one program with a traced bound. On a CPU or a TPU that costs nothing.

    Args:
        platform: The platform that the step runs on.
        capacity: The capacity of a block.

    Example:
        >>> static_lengths("cpu", 1024), static_lengths("cuda", 1024), static_lengths("cuda", 32)
        ((), (1024, 64, 8), (32, 8))
    """
    if platform not in _WAITING or capacity == 1:
        return ()
    longest = min(capacity, _MOST_STATIC)
    return (longest, *(length for length in _STATIC_LENGTHS if length < longest))


def rows_of(capacity: int, batch: PyTree) -> int:
    """Returns the capacity of a superbatch, also for steps that are not fused."""
    if capacity > 1:
        return capacity
    row = max(1, size_bytes(batch))
    return max(1, min(_ROWS_UNFUSED, _SUPERBATCH_BYTES // row))


def _is_slow_in_a_loop(jaxpr: Any) -> bool:
    return any(one.primitive.name in _SLOW_IN_CPU_LOOPS for one in equations(jaxpr))
