"""The executable: a step and its metrics as one compiled block with a traced bound.

    program = Program(step, metrics, capacity=64, num_rows=64, options={})
    carry = (state, program.init_metrics())
    carry, outputs, ring, marker = program.run(carry, rows, start, bound)
    values = program.values(ring, 0, 10)                      # metrics after ten iterations

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

from jaxloop._core.arrays import abstract, key_impl, put
from jaxloop._core.types import PyTree
from jaxloop._data.device_rows import Rows, Single, Stacked
from jaxloop._program.step import Step
from jaxloop.metrics.binding import Metrics
from jaxloop.metrics.exact_int import host_rows, is_exact
from jaxloop.metrics.meaning import Meanings

Carry: TypeAlias = tuple[PyTree, PyTree]
"""A step state, and the accumulators packed into one vector per dtype."""

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
        self._call: Callable[..., Any] = block
        self._init: Callable[[], list[jax.Array]] = self._fresh_metrics
        if self.options is not None:
            self._call = self._compiled(block)
            self._init = jax.jit(self._fresh_metrics)
        self._static = {
            n: self._compiled(functools.partial(self._block, length=n)) for n in self.lengths
        }
        self._accumulators = jax.eval_shape(self.metrics.init)
        self._compute = jax.jit(self._compute_rows)
        self._fresh: dict[str, PyTree] | None = None
        self._finish: Callable[[dict[str, PyTree]], dict[str, PyTree]] | None = None

    def _compiled(self, block: Callable[..., Any]) -> Any:
        return jax.jit(block, **{"donate_argnums": (0,), **(self.options or {})})

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
        out: BlockOutput = self._static.get(length, self._call)(carry, rows, start, bound)
        return out

    def init_metrics(self) -> list[jax.Array]:
        """Returns fresh accumulators, packed into one vector per dtype."""
        return self._init()

    def fresh_values(self) -> dict[str, PyTree]:
        """Returns the metrics before the first update, as NumPy values."""
        if self._fresh is None:
            ring = jax.tree.map(lambda a: a[None], self.init_metrics())
            fetch = self.values(ring, *put((np.int32(0), np.int32(1))))
            self._fresh = self.metrics.with_derived(jax.tree.map(lambda x: x[0], fetch()))
        return self._fresh

    def values(self, ring: PyTree, start: Any, stop: Any) -> Callable[[], dict[str, PyTree]]:
        """Dispatches the computation of the metrics of the rows from ``start`` to ``stop``.

        Derived metrics are not among them, because they are computed row by row on the host.

        Returns:
            A function that returns them as NumPy arrays with a leading axis of rows. The copy to
            the host has started, and the function waits for it. Only the host holds integers of
            more than 32 bits, so the function also converts those.
        """
        computed = self._compute(ring, start, stop) if self.metrics.slots else {}
        for leaf in jax.tree.leaves(computed):
            leaf.copy_to_host_async()
        if self._finish is None:
            leaves = jax.tree.leaves(computed, is_leaf=is_exact)
            self._finish = host_rows if any(map(is_exact, leaves)) else dict
        finish = self._finish
        return lambda: finish(jax.device_get(computed))

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

    def _fresh_metrics(self) -> list[jax.Array]:
        return _packed(self.metrics.init())

    def _advance(self, carry: Any, batch: PyTree) -> tuple[PyTree, PyTree, dict[str, PyTree]]:
        state, packed = carry
        new, outputs = self.step(batch, state)
        accumulators = _unpacked(packed, self._accumulators)
        accumulators = self.metrics.update(accumulators, outputs, new, batch)
        return new, _packed(accumulators), outputs

    def _single(self, carry: Any, rows: Rows, start: Any, bound: Any) -> BlockOutput:
        state, packed, outputs = self._advance(carry, rows.row(start))
        ring = jax.tree.map(lambda a: a[None], packed)
        return (state, packed), outputs, ring, _after(bound)

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
        return carry, outputs, ring, _after(bound)

    def _compute_rows(self, ring: PyTree, start: Any, stop: Any) -> dict[str, PyTree]:
        # One loop body serves one row or many, so a value does not depend on which rows are read.
        rows = jax.tree.leaves(ring)[0].shape[0] if jax.tree.leaves(ring) else 1

        def row(i: Any) -> dict[str, PyTree]:
            at = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), ring)
            return self.metrics.compute(_unpacked(at, self._accumulators))

        shapes = jax.eval_shape(row, jax.ShapeDtypeStruct((), jnp.int32))
        values = jax.tree.map(lambda v: jnp.zeros((rows, *v.shape), v.dtype), shapes)

        def body(i: Any, values: dict[str, PyTree]) -> dict[str, PyTree]:
            return jax.tree.map(
                lambda all, one: lax.dynamic_update_index_in_dim(all, one, i, 0), values, row(i)
            )

        computed: dict[str, PyTree] = lax.fori_loop(start, stop, body, values)
        return computed


def _packed(accumulators: PyTree) -> list[jax.Array]:
    """Packs accumulators into one vector per dtype, as XLA updates few arrays faster than many."""
    leaves = jax.tree.leaves(accumulators)
    return [jnp.concatenate([jnp.ravel(leaves[i]) for i in group]) for group in _by_dtype(leaves)]


def _unpacked(vectors: list[jax.Array], like: PyTree) -> PyTree:
    """Undoes `_packed`, with the structure and shapes of ``like``."""
    leaves, tree = jax.tree.flatten(like)
    for vector, group in zip(vectors, _by_dtype(leaves), strict=True):
        start = 0
        for i in group:
            size = int(np.prod(leaves[i].shape))
            leaves[i] = vector[start : start + size].reshape(leaves[i].shape)
            start += size
    return jax.tree.unflatten(tree, leaves)


def _by_dtype(leaves: list[Any]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault(leaf.dtype, []).append(index)
    return list(groups.values())


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
