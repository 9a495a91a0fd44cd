"""The executables: a step and its metrics as one compiled block with a traced bound.

    program = specialize(step_fn, specs, batch, state, fuse="auto", jit=True)
    accs = program.init_metrics()
    out = program.run((state, accs), source, start, bound)    # any number of batches, same bits
    values = program.values(out.ring, 0, 10)                  # metrics after ten iterations

Nothing about handlers, observers, logging or block lengths enters here. The compiled program is a
function of step, metrics, shapes and ``fuse`` alone: XLA contracts multiplications and additions by
context, so a program that knew who watches would differ in its last bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxloop._core.arrays import abstract, put
from jaxloop._core.types import PyTree
from jaxloop._data.device_rows import Single, Stacked
from jaxloop._program.step import Step
from jaxloop.metrics.binding import Metrics


class Output(NamedTuple):
    """What a block gives: the new carry, the last outputs, and a row of accumulators a step."""

    carry: tuple[PyTree, PyTree]
    outputs: dict[str, PyTree]
    ring: PyTree
    marker: Any


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, shape)
        return jax.random.wrap_key_data(
            jnp.zeros(data.shape, data.dtype),
            impl=jax.random.key_impl(shape),  # type: ignore[arg-type]  # a dtype is all it needs
        )
    return jnp.zeros(shape.shape, shape.dtype)


@dataclasses.dataclass(eq=False)
class Program:
    """The executables of one step, its metrics and one state structure.

    Attributes:
        capacity: How many iterations a block may hold; 1: never fused.
        rows: How many batches a stack may hold.
        span: How many iterations a block should have so as to be neither short nor long: whoever
            has a clock says so; None: nobody has yet.
    """

    step: Step
    metrics: Metrics
    capacity: int
    rows: int
    options: dict[str, Any] | None
    span: int | None = None

    def __post_init__(self) -> None:
        block = self._single if self.capacity == 1 else self._block
        self._call: Callable[..., Any] = block
        self._init: Callable[[], list[jax.Array]] = self._fresh_metrics
        if self.options is not None:
            self._call = jax.jit(block, **{"donate_argnums": (0,), **self.options})
            self._init = jax.jit(self._fresh_metrics)
        self._accumulators = jax.eval_shape(self.metrics.init)
        self._compute = jax.jit(self._compute_rows)
        self._fresh: dict[str, PyTree] | None = None

    @property
    def room(self) -> int:
        """How many iterations the next block may have."""
        return min(self.capacity, self.span or 1)

    def fresh_values(self) -> dict[str, PyTree]:
        """The metrics before the first update, as NumPy values."""
        if self._fresh is None:
            ring = jax.tree.map(lambda a: a[None], self.init_metrics())
            fetch = self.values(ring, *put((np.int32(0), np.int32(1))))
            self._fresh = jax.tree.map(lambda x: x[0], fetch())
        return self._fresh

    def init_metrics(self) -> list[jax.Array]:
        """Fresh accumulators, all of one dtype in one vector."""
        return self._init()

    def _fresh_metrics(self) -> list[jax.Array]:
        return _packed(self.metrics.init())

    def _advance(self, carry: Any, batch: PyTree) -> tuple[PyTree, PyTree, dict[str, PyTree]]:
        state, accs = carry
        new, outputs = self.step(batch, state)
        accs = self.metrics.update(_unpacked(accs, self._accumulators), outputs, new, batch)
        return new, _packed(accs), outputs

    def _single(self, carry: Any, source: Any, start: Any, bound: Any) -> Output:
        state, accs, outputs = self._advance(carry, source.row(start))
        ring = jax.tree.map(lambda a: a[None], accs)
        return Output((state, accs), outputs, ring, _after(bound))

    def _block(self, carry: Any, source: Any, start: Any, bound: Any) -> Output:
        row = jax.eval_shape(source.row, jax.ShapeDtypeStruct((), jnp.int32))
        outputs = self.step.outputs(row, carry[0])
        ring = jax.tree.map(
            lambda a: _zeros(jax.ShapeDtypeStruct((self.capacity, *a.shape), a.dtype)),
            carry[1],
        )

        def body(i: Any, loop: Any) -> Any:
            carry, _, ring = loop
            state, accs, outputs = self._advance(carry, source.row(start + i))
            ring = jax.tree.map(
                lambda rows, a: lax.dynamic_update_index_in_dim(rows, a, i, 0), ring, accs
            )
            return (state, accs), outputs, ring

        begin = (carry, jax.tree.map(_zeros, outputs), ring)
        # A lower bound of the same dtype as the upper one: 64 bits would not mix with 32.
        carry, outputs, ring = lax.fori_loop(jnp.int32(0), bound, body, begin)
        return Output(carry, outputs, ring, _after(bound))

    def run(self, carry: tuple[PyTree, PyTree], source: Any, start: Any, bound: Any) -> Output:
        """Runs the step over rows ``start`` to ``start + bound`` of ``source``.

        The carry is donated. The marker is ready when the block is done.
        """
        return self._call(carry, source, start, bound)

    def _compute_rows(self, ring: PyTree, start: Any, stop: Any) -> dict[str, PyTree]:
        # One body for one row and for many, so that a value does not depend on who wants others.
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

        return lax.fori_loop(start, stop, body, values)

    def values(self, ring: PyTree, start: Any, stop: Any) -> Callable[[], dict[str, PyTree]]:
        """The metrics of the rows from ``start`` to ``stop``, computed now, without waiting.

        Returns:
            A function that gives them as NumPy arrays with a leading axis of rows; the copy to the
            host has begun, and is waited for there.
        """
        computed = self._compute(ring, start, stop) if self.metrics.names else {}
        for leaf in jax.tree.leaves(computed):
            leaf.copy_to_host_async()
        return functools.partial(jax.device_get, computed)

    def lower(self, carry: PyTree, batch: PyTree) -> Any:
        """The block, lowered for shapes; for reports."""
        source: Any = Single(abstract(batch))
        if jax.tree.leaves(batch):
            shape = jax.ShapeDtypeStruct
            source = Stacked(jax.tree.map(lambda b: shape((self.rows, *b.shape), b.dtype), batch))
        number = jax.ShapeDtypeStruct((), jnp.int32)
        call = jax.jit(self._single) if self.options is None else self._call
        return call.lower(abstract(carry), source, number, number)  # type: ignore[attr-defined]  # jitted


def _packed(accs: PyTree) -> list[jax.Array]:
    """Accumulators as one vector a dtype: XLA updates few arrays in less time than many."""
    return [
        jnp.concatenate([jnp.ravel(leaves[i]) for i in group])
        for leaves in [jax.tree.leaves(accs)]
        for group in _by_dtype(leaves)
    ]


def _unpacked(vectors: list[jax.Array], like: PyTree) -> PyTree:
    """What was packed, with the structure and shapes of ``like``."""
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


def _after(bound: Any) -> Any:
    # An output of its own: JAX hands back an input that is returned as it is, and that is ready
    # long before the block is done.
    return bound + jnp.int32(1)
