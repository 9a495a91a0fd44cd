"""The report of `Loop.check`: what runs when, and what the step costs.

    print(report(parts, output_transform=None))
    report.utilization(final_state)         # the share of the device's peak that the run reached

A report compiles the step but does not run it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from jaxloop._core.checks import name_of
from jaxloop._core.events import Event
from jaxloop._core.placement import devices_of
from jaxloop._core.schedule import block_length
from jaxloop._core.state import Snapshot
from jaxloop._core.tables import aligned
from jaxloop._core.times import EpochTime
from jaxloop._engine.parts import Parts
from jaxloop._engine.peaks import peak_of
from jaxloop._program.flops import count_flops
from jaxloop.errors import ArgumentError
from jaxloop.metrics.weights import leading_axis


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
        model_flops: Floating-point operations of the matrix multiplications and convolutions of one
            step, forward and backward, where a multiplication with an addition counts as two. A
            `jax.lax.scan` counts as often as it runs, and a loop of unknown length once. What the
            backward pass computes again, as with `jax.checkpoint`, counts again.
        flops_are_exact: Whether ``model_flops`` has no loop of unknown length, no kernel of your
            own and no branches of different cost.
        num_examples: The number of examples in the first batch, which is the length of the first
            axis of its first array, or None without one.
        device_kind: The kind of the devices of the step state.
        num_devices: Their number.
        peak_flops: The peak rate of all these devices in operations a second, for the dtype of most
            matrix multiplications, or None if it is unknown.
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
    model_flops: int = 0
    flops_are_exact: bool = True
    num_examples: int | None = None
    device_kind: str = "unknown"
    num_devices: int = 1
    peak_flops: float | None = None

    @property
    def flops_per_example(self) -> float | None:
        """``model_flops`` for each example of the batch, or None if their number is unknown."""
        return self.model_flops / self.num_examples if self.num_examples else None

    def utilization(self, measured: Snapshot | float, *, peak_flops: float | None = None) -> float:
        """Returns the model FLOPs utilization: the share of the peak rate that training reaches.

        It is ``model_flops / (seconds_per_step * peak_flops)``. The seconds are those of all
        finished epochs, without compiling, validations and saves. If the last batch of an epoch is
        smaller than the first one, the result is a little too large.

        Args:
            measured: The `State` or `Snapshot` of a run with finished epochs, or the seconds that
                one step takes.
            peak_flops: The peak rate of all devices together, in operations a second. By default,
                that of the report.

        Raises:
            ArgumentError: The peak rate is unknown, the step has no matrix multiplications, or
                nothing was measured.

        Source: Chowdhery and others, "PaLM: Scaling language modeling with pathways", 2022,
        appendix B.

        Example:
            >>> import jax.numpy as jnp
            >>> import jaxloop as jl
            >>> loop = jl.loop(lambda batch, w: w @ batch)
            >>> report = loop.check([jnp.ones((8, 8))], init_state=jnp.ones((8, 8)))
            >>> report.model_flops, report.utilization(1e-6, peak_flops=1e10)
            (1024, 0.1024)
        """
        if not self.model_flops:
            raise ArgumentError(
                "utilization: the step must have matrix multiplications, got a report without any",
                fix="check a loop that has not ended, with a step whose work is in these",
            )
        peak = self.peak_flops if peak_flops is None else peak_flops
        if peak is None:
            raise ArgumentError(
                f"utilization: the peak rate of {self.num_devices} x {self.device_kind} is unknown",
                fix="pass peak_flops=, in operations a second, from the data sheet",
            )
        seconds = seconds_per_step(measured) if isinstance(measured, Snapshot) else measured
        for name, number in (("peak_flops", peak), ("the seconds of a step", seconds)):
            if not 0 < number < math.inf:
                raise ArgumentError(
                    f"utilization: {name} must be positive, got {number}",
                    fix="pass a state with finished epochs, or measured seconds",
                )
        return self.model_flops / (seconds * peak)

    def __str__(self) -> str:
        rows = [("kind", "name", "events", "filter"), *self.schedule]
        facts = {
            "first block": f"{self.block_length} iterations of at most {self.capacity}",
            "step state": f"{self.num_leaves} leaves, {self.num_elements} numbers, "
            f"{self.size_bytes} bytes",
            "compiled": f"{self.flops if self.flops is not None else 'unknown'} FLOPs, "
            f"{self.temp_bytes if self.temp_bytes is not None else 'unknown'} temporary bytes",
            "matrix products": self._flops_in_words(),
            "devices": f"{self.num_devices} x {self.device_kind}, peak "
            + ("unknown" if self.peak_flops is None else f"{self.peak_flops:.4g} FLOPs a second"),
            "output": self.output,
        }
        return "\n".join([*aligned(rows), *(f"{name}: {fact}" for name, fact in facts.items())])

    def _flops_in_words(self) -> str:
        text = f"{self.model_flops:.4g} FLOPs a step"
        if self.flops_per_example is not None:
            text += f", {self.flops_per_example:.4g} per example"
        return text if self.flops_are_exact else f"{text} (loops of unknown length count once)"


def seconds_per_step(state: Snapshot) -> float:
    """Returns the seconds of a step in finished epochs, without compiling, validations and saves.

    Handlers and observers count, because the device may work while they run.

    Raises:
        ArgumentError: No epoch has ended, or none had a step.
    """
    times = [EpochTime.of(seconds) for seconds in state.times.values()]
    num_steps = state.step - (0 if state.epoch in state.times else state.iteration)
    if not times or num_steps < 1:
        raise ArgumentError(
            f"utilization: a run must have finished an epoch, got a state after step {state.step}",
            fix="pass the state of a longer run, or the seconds of a step",
        )
    spent = sum(float(one) - one.compile_s - one.validation_s - one.saves_s for one in times)
    return spent / num_steps


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
    made = Report(
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
    return _with_model_flops(made, parts)


def _with_model_flops(made: Report, parts: Parts) -> Report:
    program, sample = parts.blocks.program, parts.blocks.sample
    devices = devices_of(parts.carry.step_state)
    made = dataclasses.replace(made, device_kind=devices[0].device_kind, num_devices=len(devices))
    if program is None or sample is None:
        return made
    jaxpr, _ = program.step.trace(sample.value, parts.carry.step_state)
    count = count_flops(jaxpr)
    peak = peak_of(made.device_kind, count.dtype)
    return dataclasses.replace(
        made,
        model_flops=count.flops,
        flops_are_exact=count.is_exact,
        num_examples=leading_axis(sample.value),
        peak_flops=None if peak is None else peak * made.num_devices,
    )
