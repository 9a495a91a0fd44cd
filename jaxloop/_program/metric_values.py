"""The values of the metrics, from packed accumulators.

    values = MetricValues(metrics)
    packed = values.init()
    fetch = values.start(ring, 3, 7, numbers)      # metrics after the fourth to the seventh row
    fetch()["loss"]                                # NumPy, with a leading axis of four rows

On a CPU, NumPy computes them if it can, because that compiles and dispatches nothing. Invariant:
which of the two computes them depends on the metrics and the platform alone, and the value of a row
does not depend on the other rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxloop._core.arrays import abstract, put, size_bytes
from jaxloop._core.types import PyTree
from jaxloop._program.host_eval import on_host, on_host_rows
from jaxloop.metrics.collection import Metrics
from jaxloop.metrics.exact_int import host_rows, is_exact
from jaxloop.metrics.packing import Packed

_MOST_HOST_BYTES = 2**16
"""The host computes from accumulators of at most this size, because it copies them."""

Fetch = Callable[[], dict[str, PyTree]]
"""Waits for the device, and returns values with a leading axis of rows."""


class MetricValues:
    """The functions that make accumulators and compute values from them.

    Args:
        metrics: The metrics.
        jit: Whether fresh accumulators may be made by an executable.

    Attributes:
        shapes: The shapes of packed accumulators.
    """

    def __init__(self, metrics: Metrics, *, jit: bool) -> None:
        self._metrics = metrics
        self.shapes: Packed = jax.eval_shape(self._fresh)
        suits = (
            jax.default_backend() == "cpu"
            and len(self.shapes) == 1  # a vector, and no typed key
            and size_bytes(self.shapes) <= _MOST_HOST_BYTES
        )
        fresh = on_host(self._fresh) if suits else None
        self._host_fresh: list[np.ndarray[Any, Any]] | None = None if fresh is None else fresh()
        self._host_rows = on_host_rows(self._compute, self.shapes) if suits else None
        self._init: Callable[[], Packed] = jax.jit(self._fresh) if jit else self._fresh
        self._compute_rows = jax.jit(self._of_ring)
        self._compute_one = jax.jit(
            lambda packed: self._of_ring([one[None] for one in packed], jnp.int32(0), jnp.int32(1))
        )
        self._fresh_values: dict[str, PyTree] | None = None

    @property
    def on_host(self) -> bool:
        """Whether the host computes the values."""
        return self._host_rows is not None

    def init(self) -> Packed:
        """Returns fresh accumulators, packed into one vector.

        They are NumPy arrays if the host can make them. Passing these to a block takes a quarter of
        the time of a transfer, and no executable.
        """
        if not self.shapes:
            return []
        if self._host_fresh is None:
            return self._init()
        # Copied, because a block may use the memory of an array that it gets.
        return [one.copy() for one in self._host_fresh]  # type: ignore[misc]  # see above

    def fresh_values(self) -> dict[str, PyTree]:
        """Returns the metrics before the first update, as NumPy values."""
        if self._fresh_values is None:
            ring = put([one[None] for one in self.init()])
            values = self.start(ring, 0, 1, put({0: np.int32(0), 1: np.int32(1)}))()
            self._fresh_values = self._metrics.with_derived(row_of(values, 0))
        return self._fresh_values

    @functools.cached_property
    def value_shapes(self) -> dict[str, PyTree]:
        """The shapes and dtypes of the metrics' values. Exact numbers are one leaf."""
        computed = jax.eval_shape(lambda: self._metrics.compute(self._metrics.init()))
        values: dict[str, PyTree] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), computed, is_leaf=is_exact
        )
        for name, _ in self._metrics.derived:
            values[name] = abstract(self.fresh_values()[name])
        return values

    def start(
        self, ring: Sequence[Any], start: int, stop: int, numbers: Mapping[int, Any]
    ) -> Fetch:
        """Starts to compute the metrics of the rows from ``start`` to ``stop``.

        Derived metrics are not among them, because they are computed row by row on the host.

        Args:
            ring: Packed accumulators with a leading axis.
            start: The first row.
            stop: The row after the last one.
            numbers: Int32 scalars on the device, by value.

        Returns:
            A function that waits for the values. Only the host holds integers of more than 32 bits,
            so the function also converts those.
        """
        host = self._host_rows
        if not self._metrics.slots:
            return dict
        if host is not None:
            return lambda: host_rows(host([np.asarray(one)[start:stop] for one in ring]))
        computed = self._compute_rows(ring, numbers[start], numbers[stop])
        for leaf in jax.tree.leaves(computed):
            leaf.copy_to_host_async()

        def fetch() -> dict[str, PyTree]:
            values: dict[str, PyTree] = host_rows(jax.device_get(computed))
            return jax.tree.map(lambda x: x[start:stop], values)

        return fetch

    def of_rows(self, rows: Sequence[Packed]) -> dict[str, PyTree]:
        """Returns the metrics of some accumulators, with a leading axis, if the host computes them.

        It waits for the device.
        """
        ring = [np.stack([np.asarray(one) for one in column]) for column in zip(*rows, strict=True)]
        return self.start(ring, 0, len(rows), {})()

    def of_last(self, packed: Packed) -> dict[str, PyTree]:
        """Returns all metrics of some accumulators, also the derived ones. It waits for the device.

        The values are those of the same accumulators as a row of a ring.
        """
        if not self._metrics.slots:
            return self.derived({})
        if self.on_host:
            values = self.start([np.asarray(one)[None] for one in packed], 0, 1, {})()
        else:
            values = host_rows(jax.device_get(self._compute_one(packed)))
        return self.derived(row_of(values, 0))

    def derived(self, row: dict[str, PyTree]) -> dict[str, PyTree]:
        """Returns the values of a row together with those of the derived metrics."""
        return self._metrics.with_derived(row)

    # --- what is computed ----------------------------------------------------------------------

    def _fresh(self) -> Packed:
        return self._metrics.packing.pack(self._metrics.init())

    def _compute(self, packed: Packed) -> dict[str, PyTree]:
        return self._metrics.compute(self._metrics.packing.unpack(packed))

    def _of_ring(self, ring: Packed, start: Any, stop: Any) -> dict[str, PyTree]:
        # One loop body serves one row or many, so a value does not depend on which rows are read.
        def row(i: Any) -> dict[str, PyTree]:
            return self._compute([lax.dynamic_index_in_dim(one, i, keepdims=False) for one in ring])

        shapes = jax.eval_shape(row, jax.ShapeDtypeStruct((), jnp.int32))
        num_rows = ring[0].shape[0]
        values = jax.tree.map(lambda v: jnp.zeros((num_rows, *v.shape), v.dtype), shapes)

        def body(i: Any, values: dict[str, PyTree]) -> dict[str, PyTree]:
            return jax.tree.map(
                lambda all, one: lax.dynamic_update_index_in_dim(all, one, i, 0), values, row(i)
            )

        computed: dict[str, PyTree] = lax.fori_loop(start, stop, body, values)
        return computed


def row_of(values: Mapping[str, PyTree], index: int) -> dict[str, PyTree]:
    """Returns one row of values that have a leading axis.

    The row is copied, because a view would keep the values of all rows alive.
    """
    return {
        name: value[index]
        if isinstance(value, np.ndarray) and value.ndim == 1
        else jax.tree.map(lambda x: x[index].copy(), value)
        for name, value in values.items()
    }
