"""The executable: a step and its metrics as one compiled block with a traced bound.

    program = Program(step, metrics, capacity=64, num_rows=64, options={})
    carry = (state, program.values.init())
    carry, outputs, ring, marker = program.run(carry, rows, start, bound)
    fetch = program.values.start(ring, 9, 10, numbers)        # metrics after ten iterations

On a platform where a traced bound is slow, blocks of a few fixed lengths are compiled with a
constant bound; see `jaxloop._program.sizing.static_lengths`. They compute the same bits.

The compiled program depends only on the step, the metrics, the shapes and ``fuse``. Handlers,
observers, logging and block lengths never affect it. XLA contracts multiplications and additions by
context, so a program that depended on them would give results that differ in the last bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxloop._core.arrays import abstract, key_impl
from jaxloop._core.batch import Signature
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
        lengths: The lengths of blocks with a constant bound, from the longest. Each is compiled
            when a block of this length runs first.
    """

    step: Step
    metrics: Metrics
    capacity: int
    num_rows: int
    options: dict[str, Any] | None
    reported: tuple[str, ...] = ()
    meanings: Meanings = dataclasses.field(default_factory=dict)
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        block = self._single if self.capacity == 1 else self._block
        self._call: Callable[..., Any] = self._eager(block)
        if self.options is not None:
            self._call = self._compiled(block)
        self._static = {
            n: self._compiled(functools.partial(self._block, length=n)) for n in self.lengths
        }
        self.values = MetricValues(self.metrics, jit=self.options is not None)
        self._called: set[Any] = set()

    def _eager(self, block: Callable[..., Any]) -> Callable[..., Any]:
        # The marker is an operation of its own, which does not wait for the others.
        return lambda *arguments: jax.block_until_ready(block(*arguments))

    def _compiled(self, block: Callable[..., Any]) -> Any:
        return jax.jit(block, **{"donate_argnums": (0,), **(self.options or {})})

    def compiles(self, rows: Rows, signature: Signature, length: int) -> bool:
        """Returns whether `run` compiles for such arguments, because it is called so first.

        Args:
            rows: The batches.
            signature: The shapes and dtypes of a batch.
            length: See `run`.
        """
        if self.options is None:
            return False
        key = (type(rows), signature, length if length in self._static else 0)
        if key in self._called:
            return False
        self._called.add(key)
        return True

    def cut(self, length: int) -> int:
        """Returns how many of ``length`` iterations the next block has.

        It is the longest constant bound that fits. If none fits, the bound is traced.
        """
        return next((one for one in self.lengths if one <= length), length)

    def run(self, carry: Carry, rows: Rows, start: Any, bound: Any, length: int = 0) -> BlockOutput:
        """Runs the step over rows ``start`` to ``start + bound``. The carry is donated.

        Args:
            carry: The step state and the accumulators.
            rows: The batches.
            start: The first row.
            bound: The number of rows, an int32 scalar on the device.
            length: The same number on the host. If it is one of `lengths`, the bound is constant.
        """
        call = self._static.get(length, self._call)
        packed = carry[1]
        if packed and type(packed[0]) is np.ndarray:
            with jax.transfer_guard_host_to_device("allow"):  # fresh accumulators
                out: BlockOutput = call(carry, rows, start, bound)
            return out
        out = call(carry, rows, start, bound)
        return out

    def lower(self, carry: PyTree, batch: PyTree, length: int = 0) -> Any:
        """Lowers the block that `run` would run, for reports."""
        rows: Rows = Single(abstract(batch))
        if jax.tree.leaves(batch):
            shape = jax.ShapeDtypeStruct
            rows = Stacked(jax.tree.map(lambda b: shape((self.num_rows, *b.shape), b.dtype), batch))
        number = jax.ShapeDtypeStruct((), jnp.int32)
        traced = jax.jit(self._single) if self.options is None else self._call
        return self._static.get(length, traced).lower(abstract(carry), rows, number, number)

    # --- what is compiled ----------------------------------------------------------------------

    def _advance(self, carry: Any, batch: PyTree) -> tuple[PyTree, PyTree, dict[str, PyTree]]:
        state, packed = carry
        new, outputs = self.step(batch, state)
        return new, self.metrics.add(packed, outputs, new, batch), outputs

    def _single(self, carry: Any, rows: Rows, start: Any, bound: Any) -> BlockOutput:
        state, packed, outputs = self._advance(carry, rows.row(start))
        ring = jax.tree.map(lambda a: a[None], packed)
        return (state, packed), outputs, ring, marker_after(bound)

    def _block(
        self, carry: Any, rows: Rows, start: Any, bound: Any, length: int | None = None
    ) -> BlockOutput:
        row = jax.eval_shape(rows.row, jax.ShapeDtypeStruct((), jnp.int32))
        outputs = self.step.outputs(row, carry[0])
        ring = jax.tree.map(
            lambda a: _zeros(jax.ShapeDtypeStruct((self.capacity, *a.shape), a.dtype)),
            carry[1],
        )

        def body(loop: Any) -> Any:
            i, carry, _, ring = loop
            state, packed, outputs = self._advance(carry, rows.row(start + i))
            ring = jax.tree.map(
                lambda rows, a: lax.dynamic_update_index_in_dim(rows, a, i, 0), ring, packed
            )
            return i + 1, (state, packed), outputs, ring

        # XLA knows the number of iterations only if the condition compares with a constant.
        stop = bound if length is None else length
        begin = (jnp.int32(0), carry, jax.tree.map(_zeros, outputs), ring)
        _, carry, outputs, ring = lax.while_loop(lambda loop: loop[0] < stop, body, begin)
        return carry, outputs, ring, marker_after(bound)


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, shape)
        return jax.random.wrap_key_data(
            jnp.zeros(data.shape, data.dtype),
            impl=key_impl(shape.dtype),
        )
    return jnp.zeros(shape.shape, shape.dtype)


def marker_after(bound: Any) -> Any:
    """Returns an int32 scalar that is ready when the block that returns it is done."""
    # It must be computed. JAX returns an unchanged input as is, and that is ready long before.
    return bound + jnp.int32(1)
