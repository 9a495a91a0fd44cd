"""The executable: a step and its metrics as one compiled block with a traced bound.

    program = Program(step, metrics, capacity=64, num_rows=64, options={})
    carry = (state, program.values.init())
    carry, outputs, ring, marker = program.run(carry, rows, start, bound)
    fetch = program.values.start(ring, 9, 10, number)         # metrics after ten iterations

The compiled program depends only on the step, the metrics, the shapes and ``fuse``. Handlers,
observers, logging and block lengths never affect it. XLA contracts multiplications and additions by
context, so a program that depended on them would give results that differ in the last bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxloop._core.arrays import abstract, key_impl
from jaxloop._core.types import PyTree
from jaxloop._data.device_rows import Rows, Single, Stacked
from jaxloop._program.metric_values import MetricValues
from jaxloop._program.step import Step
from jaxloop.metrics.collection import Metrics
from jaxloop.metrics.meaning import Meanings

Carry: TypeAlias = tuple[PyTree, PyTree]
"""A step state, and the accumulators packed into one vector."""

BlockOutput: TypeAlias = tuple[Carry, dict[str, PyTree], PyTree, Any]
"""The result of a block: the new carry, the outputs of the last step, a ring of the accumulators
after each iteration, and a marker, an int32 scalar that is ready when the block is done. It is a
plain tuple, because JAX returns those fastest."""


@dataclasses.dataclass(eq=False)
class Program:
    """The executables of one step, its metrics and one state structure.

    Attributes:
        step: The step.
        metrics: The metrics, bound to what the step reports.
        capacity: The maximum number of iterations in a block. If 1, the step is never fused.
        num_rows: The maximum number of batches in a superbatch.
        options: The options for `jax.jit`. If None, everything runs op by op.
        reported: The names that the step reports.
        values: Computes the values of the metrics.
        meanings: What the accumulators mean. A state keeps it, and the program does not use it.
    """

    step: Step
    metrics: Metrics
    capacity: int
    num_rows: int
    options: dict[str, Any] | None
    reported: tuple[str, ...] = ()
    meanings: Meanings = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        block = self._single if self.capacity == 1 else self._block
        self._call: Callable[..., Any] = block
        if self.options is not None:
            self._call = jax.jit(block, **{"donate_argnums": (0,), **self.options})
        self.values = MetricValues(self.metrics, jit=self.options is not None)

    def run(self, carry: Carry, rows: Rows, start: Any, bound: Any) -> BlockOutput:
        """Runs the step over rows ``start`` to ``start + bound``. The carry is donated."""
        out: BlockOutput = self._call(carry, rows, start, bound)
        return out

    def lower(self, carry: PyTree, batch: PyTree) -> Any:
        """Lowers the block for these shapes, for reports."""
        rows: Rows = Single(abstract(batch))
        if jax.tree.leaves(batch):
            shape = jax.ShapeDtypeStruct
            rows = Stacked(jax.tree.map(lambda b: shape((self.num_rows, *b.shape), b.dtype), batch))
        number = jax.ShapeDtypeStruct((), jnp.int32)
        call = jax.jit(self._single) if self.options is None else self._call
        return call.lower(abstract(carry), rows, number, number)  # type: ignore[attr-defined]  # jitted

    # --- what is compiled ----------------------------------------------------------------------

    def _advance(self, carry: Any, batch: PyTree) -> tuple[PyTree, PyTree, dict[str, PyTree]]:
        state, packed = carry
        new, outputs = self.step(batch, state)
        return new, self.metrics.add(packed, outputs, new, batch), outputs

    def _single(self, carry: Any, rows: Rows, start: Any, bound: Any) -> BlockOutput:
        state, packed, outputs = self._advance(carry, rows.row(start))
        ring = jax.tree.map(lambda a: a[None], packed)
        return (state, packed), outputs, ring, _after(bound)

    def _block(self, carry: Any, rows: Rows, start: Any, bound: Any) -> BlockOutput:
        row = jax.eval_shape(rows.row, jax.ShapeDtypeStruct((), jnp.int32))
        outputs = self.step.outputs(row, carry[0])
        ring = jax.tree.map(
            lambda a: _zeros(jax.ShapeDtypeStruct((self.capacity, *a.shape), a.dtype)),
            carry[1],
        )

        def body(i: Any, loop: Any) -> Any:
            carry, _, ring = loop
            state, packed, outputs = self._advance(carry, rows.row(start + i))
            ring = jax.tree.map(
                lambda rows, a: lax.dynamic_update_index_in_dim(rows, a, i, 0), ring, packed
            )
            return (state, packed), outputs, ring

        begin = (carry, jax.tree.map(_zeros, outputs), ring)
        # Both bounds must have the same dtype. A Python 0 would be 64 bits wide under x64.
        carry, outputs, ring = lax.fori_loop(jnp.int32(0), bound, body, begin)
        return carry, outputs, ring, _after(bound)


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, shape)
        return jax.random.wrap_key_data(
            jnp.zeros(data.shape, data.dtype),
            impl=key_impl(shape.dtype),
        )
    return jnp.zeros(shape.shape, shape.dtype)


def _after(bound: Any) -> Any:
    # The marker must be computed. JAX returns an unchanged input as is, and that is ready long
    # before the block is done.
    return bound + jnp.int32(1)
