"""The executable of an evaluation: a step and its metrics, folded over the batches of a window.

    fold = Fold(step, metrics, structure, capacity=64, num_rows=64, lengths=())
    leaves, packed, marker = fold.run(leaves, packed, rows, start, bound, 40)

Nothing but accumulators comes out, so a window of any length is one dispatch without a ring. Leaves
of the step state that the step returns unchanged are plain inputs. They are neither copied nor
donated, so an evaluation reads the parameters where the training has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Literal

from jaxloop._core.arrays import some_arithmetic
from jaxloop._core.types import PyTree
from jaxloop._data.device_rows import Rows, Stacked
from jaxloop._program.block import marker_after
from jaxloop._program.step import Step
from jaxloop.metrics.collection import Metrics
from jaxloop.metrics.packing import Packed

Leaves: TypeAlias = list[Any]
"""The leaves of a step state."""


class Fold:
    """The executables of an evaluation.

    Args:
        step: The step.
        metrics: The metrics, bound to what the step reports.
        structure: The structure of the step state.
        capacity: If 1, the step is never fused.
        num_rows: See below.
        lengths: See below.

    Attributes:
        num_rows: The maximum number of batches in a superbatch.
        lengths: The lengths of windows with a constant bound, from the longest. Each is compiled
            when a window of this length runs first.
    """

    def __init__(
        self,
        step: Step,
        metrics: Metrics,
        structure: Any,
        *,
        capacity: int,
        num_rows: int,
        lengths: tuple[int, ...],
    ) -> None:
        self.num_rows, self.lengths = num_rows, lengths
        self._step, self._metrics, self._structure = step, metrics, structure
        self._is_fused = capacity > 1
        self._call = _compiled(self._over_rows if self._is_fused else self._single)
        self._static = {n: _compiled(functools.partial(self._over_rows, length=n)) for n in lengths}

    def cut(self, length: int) -> int:
        """Returns how many of ``length`` batches the next window has."""
        if not self._is_fused:
            return 1
        return next((one for one in self.lengths if one <= length), length)

    def run(
        self, leaves: Leaves, packed: Packed, rows: Rows, start: Any, bound: Any, length: int
    ) -> tuple[Leaves, Packed, Any]:
        """Runs the step over rows ``start`` to ``start + bound``.

        Args:
            leaves: The leaves of the step state.
            packed: The accumulators, which are donated.
            rows: The batches.
            start: The first row.
            bound: The number of rows, an int32 scalar on the device.
            length: The same number on the host. If it is one of `lengths`, the bound is constant.

        Returns:
            The new leaves and accumulators, and a marker, an array that is ready when the device
            is done.
        """
        call = self._static.get(length, self._call)
        if packed and isinstance(packed[0], np.ndarray):
            with jax.transfer_guard_host_to_device("allow"):  # the first window of an evaluation
                changed, packed, marker = call(packed, leaves, rows, start, bound)
        else:
            changed, packed, marker = call(packed, leaves, rows, start, bound)
        if changed:
            leaves = leaves.copy()
            for index, leaf in changed.items():
                leaves[index] = leaf
        return leaves, packed, marker

    # --- what is compiled ----------------------------------------------------------------------

    def _single(self, packed: Packed, leaves: Leaves, rows: Rows, start: Any, bound: Any) -> Any:
        batch = rows.row(start)
        carried, counters = self._changing(batch, leaves)
        new, packed = self._advance(packed, leaves, batch)
        return {i: new[i] for i in (*carried, *counters)}, packed, marker_after(bound)

    def _over_rows(
        self,
        packed: Packed,
        leaves: Leaves,
        rows: Rows,
        start: Any,
        bound: Any,
        length: int | None = None,
    ) -> Any:
        row = jax.eval_shape(rows.row, jax.ShapeDtypeStruct((), jnp.int32))
        carried, counters = self._changing(row, leaves)

        def body(loop: Any) -> Any:
            i, changed, packed = loop
            now = leaves.copy()
            for index in carried:
                now[index] = changed[index]
            for index in counters:
                now[index] = leaves[index] + i.astype(leaves[index].dtype)
            new, packed = self._advance(packed, now, rows.row(start + i))
            return i + 1, {index: new[index] for index in carried}, packed

        # XLA knows the number of iterations only if the condition compares with a constant.
        stop = bound if length is None else length
        begin = (jnp.int32(0), {index: leaves[index] for index in carried}, packed)
        _, changed, packed = lax.while_loop(lambda loop: loop[0] < stop, body, begin)
        for index in counters:
            changed[index] = leaves[index] + jnp.asarray(bound, leaves[index].dtype)
        # XLA does not count the arithmetic of a loop, and the host has to read the next batches.
        marker = some_arithmetic() if isinstance(rows, Stacked) else marker_after(bound)
        return changed, packed, marker

    def _advance(self, packed: Packed, leaves: Leaves, batch: PyTree) -> tuple[Leaves, Packed]:
        new, outputs = self._step(batch, jax.tree.unflatten(self._structure, leaves))
        return jax.tree.leaves(new), self._metrics.add(packed, outputs, new, batch)

    def _changing(self, batch: PyTree, leaves: Leaves) -> tuple[list[int], list[int]]:
        """Returns the indices of the leaves that the step changes: any, and those it increments.

        In an iteration, an incremented integer is its first value plus the number of iterations
        before. So it costs nothing where nothing reads it, as in most evaluations.
        """
        jaxpr = self._step.trace(batch, jax.tree.unflatten(self._structure, leaves))[0].jaxpr
        before = jaxpr.invars[len(jaxpr.invars) - len(leaves) :]
        after = jaxpr.outvars[: len(leaves)]
        changed = [index for index in range(len(leaves)) if after[index] is not before[index]]
        sources = {id(eqn.outvars[0]): eqn.invars[0] for eqn in jaxpr.eqns if _is_increment(eqn)}
        counters = [i for i in changed if sources.get(id(after[i])) is before[i]]
        return [index for index in changed if index not in counters], counters


def _compiled(fold: Callable[..., Any]) -> Any:
    return jax.jit(fold, donate_argnums=(0,))


def _is_increment(eqn: JaxprEqn) -> bool:
    """Returns whether an equation adds 1 to an integer scalar."""
    if eqn.primitive is not lax.add_p:
        return False
    one: Any = eqn.invars[1]
    if not isinstance(one, Literal) or np.ndim(one.val):
        return False
    return bool(jnp.issubdtype(np.result_type(one.val), jnp.integer) and one.val == 1)
