"""What can be known before the first step: arguments, names of metrics, and a report of it all.

check_metrics(loop)                     # raises if a watched metric cannot be there
print(Report(...))                      # what `Loop.check` returns
"""

from __future__ import annotations

import dataclasses

from jaxloop._loop import Loop
from jaxloop.errors import missing_metric


@dataclasses.dataclass(frozen=True)
class Report:
    """What `Loop.check` found; prints as a table.

    Attributes:
        schedule: What fires when: (kind, name, events, filter).
        block_length: Iterations that the first block holds.
        capacity: Iterations that a block may hold; 1: the step is never fused.
        num_leaves: Leaves of the step state.
        num_elements: Numbers in the step state; with a trainer's also of its parameters.
        size_bytes: Bytes of the step state.
        flops: Floating-point operations of a compiled block's body, where XLA tells.
        temp_bytes: Memory that the compiled block needs for itself, in bytes, where XLA tells.
    """

    schedule: tuple[tuple[str, str, str, str], ...]
    block_length: int
    capacity: int
    num_leaves: int
    num_elements: int
    size_bytes: int
    flops: float | None
    temp_bytes: int | None

    def __str__(self) -> str:
        rows = [("kind", "name", "events", "filter"), *self.schedule]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        facts = {
            "first block": f"{self.block_length} iterations of at most {self.capacity}",
            "step state": f"{self.num_leaves} leaves, {self.num_elements} numbers, "
            f"{self.size_bytes} bytes",
            "compiled": f"{self.flops if self.flops is not None else 'unknown'} FLOPs, "
            f"{self.temp_bytes if self.temp_bytes is not None else 'unknown'} bytes of its own",
        }
        return "\n".join([*lines, *(f"{name}: {fact}" for name, fact in facts.items())])


def check_metrics(loop: Loop) -> None:
    """Raises if a watched metric cannot be there when it is looked at.

    Only a handler of the user's own, which may add any metric, makes that unknowable.
    """
    declared = {one.name for one in loop.metrics}
    for index, one in enumerate(loop.attachments):
        known, anything = set(declared), False
        for position, other in enumerate(loop.attachments):
            same = bool(set(other.events) & set(one.events))
            if position == index or (same and position > index):
                continue
            anything |= other.adds is None
            known |= set(other.adds or ())
        for name in one.watches:
            if name not in known and not anything:
                raise missing_metric(one.name, name, known)
