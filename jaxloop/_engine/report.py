"""The report of `Loop.check`: what runs when, and what the step costs.

    print(report(parts, output_transform=None))

A report compiles the step but does not run it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxloop._core.checks import name_of
from jaxloop._core.events import Event
from jaxloop._core.schedule import block_length
from jaxloop._engine.parts import Parts


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `Loop.check`, which prints as a table.

    Attributes:
        schedule: What runs when: (kind, name, events, filter).
        block_length: The number of iterations in the first block.
        capacity: The maximum number of iterations in a block. If 1, the step is never fused.
        num_leaves: The number of leaves in the step state.
        num_elements: The number of array elements in the step state, including any parameters.
        size_bytes: The size of the step state in bytes.
        flops: Floating-point operations of a compiled block's body, if XLA reports them.
        temp_bytes: Temporary memory of the compiled block in bytes, if XLA reports it.
        output: The name of the output transform, or "State".
    """

    schedule: tuple[tuple[str, str, str, str], ...]
    block_length: int
    capacity: int
    num_leaves: int
    num_elements: int
    size_bytes: int
    flops: float | None
    temp_bytes: int | None
    output: str = "State"

    def __str__(self) -> str:
        rows = [("kind", "name", "events", "filter"), *self.schedule]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        facts = {
            "first block": f"{self.block_length} iterations of at most {self.capacity}",
            "step state": f"{self.num_leaves} leaves, {self.num_elements} numbers, "
            f"{self.size_bytes} bytes",
            "compiled": f"{self.flops if self.flops is not None else 'unknown'} FLOPs, "
            f"{self.temp_bytes if self.temp_bytes is not None else 'unknown'} temporary bytes",
            "output": self.output,
        }
        return "\n".join([*lines, *(f"{name}: {fact}" for name, fact in facts.items())])


def report(parts: Parts, output_transform: Callable[..., Any] | None) -> Report:
    """Returns the report of a run that has not started."""
    blocks, carry = parts.blocks, parts.carry
    leaves = jax.tree.leaves(carry.step_state)
    flops = temp_bytes = None
    capacity = length = 1
    if blocks.program is not None and blocks.sample is not None:
        capacity = blocks.program.capacity
        counts = {**parts.progress.firings, Event.ITERATION_STARTED: (1, 1)}
        length = block_length(blocks.watches, counts, blocks.room(capacity))
        compiled = blocks.program.lower(carry.values, blocks.sample.value).compile()
        flops = (compiled.cost_analysis() or {}).get("flops")
        memory = compiled.memory_analysis()
        temp_bytes = None if memory is None else memory.temp_size_in_bytes
    schedule = tuple(
        (one.kind, one.name, ", ".join(one.events), repr(one.filter))
        for one in parts.spec.attachments
    )
    return Report(
        schedule,
        length,
        capacity,
        len(leaves),
        sum(x.size for x in leaves),
        sum(x.nbytes for x in leaves),
        flops,
        temp_bytes,
        "State" if output_transform is None else name_of(output_transform),
    )
