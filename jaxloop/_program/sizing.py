"""How many iterations a block holds, and how many batches a superbatch."""

from __future__ import annotations

from typing import Any

import jax

from jaxloop._core.arrays import size_bytes
from jaxloop._core.types import PyTree

CAPACITIES = (1024, 256, 64, 32, 16, 8, 4, 2)
"""How many batches a block may hold; the largest that fits is taken."""


NO_DATA_CAPACITY = 4096
"""The same for steps without data, where only the ring of accumulators takes room."""


UNBOUNDED = 2**30
"""The same for steps without data and without metrics: nothing takes room."""


STACK_BYTES, RING_BYTES = 4 * 2**20, 4 * 2**20
"""What a stack of batches and a ring of accumulators may take. More does not fit in the caches of a
CPU, and steps on batches so large are long enough for blocks of a few."""


ROWS_UNFUSED = 16
"""How many batches of steps that run alone are put on the device together."""


USUAL_CAPACITY = 64


LARGE_BYTES = 2**20
"""What they may take together where a block holds more than the usual number of batches."""


SLOW_IN_CPU_LOOPS = ("conv_general_dilated",)
"""Primitives whose gradients XLA runs an order of magnitude slower inside a loop on CPU."""


def _contains(jaxpr: Any, names: tuple[str, ...]) -> bool:
    """Whether a primitive occurs in a jaxpr, all the way down through ``eqn.params``."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in inner.eqns:
        if eqn.primitive.name in names:
            return True
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if (hasattr(part, "eqns") or hasattr(part, "jaxpr")) and _contains(part, names):
                    return True
    return False


def capacity_of(jaxpr: Any, batch: PyTree, accumulators: PyTree, fuse: object) -> int:
    """How many iterations a block may hold; 1: the step runs alone, outside any loop.

    Decided from the jaxpr, the platform and the sizes alone, and so never different between runs.
    """
    if isinstance(fuse, int):
        return fuse
    if jax.default_backend() == "cpu" and _contains(jaxpr, SLOW_IN_CPU_LOOPS):
        return 1
    row, ring = size_bytes(batch), size_bytes(accumulators)
    if not jax.tree.leaves(batch):
        return max(2, min(NO_DATA_CAPACITY, RING_BYTES // ring)) if ring else UNBOUNDED
    for capacity in CAPACITIES:
        if capacity > USUAL_CAPACITY and capacity * (row + ring) > LARGE_BYTES:
            continue
        if capacity * row <= STACK_BYTES and capacity * ring <= RING_BYTES:
            return capacity
    return 1


def rows_of(capacity: int, batch: PyTree) -> int:
    """How many batches a stack may hold; of steps that run alone too, which read it one by one."""
    if capacity > 1:
        return capacity
    row = max(1, size_bytes(batch))
    return max(1, min(ROWS_UNFUSED, STACK_BYTES // row))
