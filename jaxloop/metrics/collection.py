"""The metrics of a loop, bound to their inputs, and their accumulators.

    metrics = bind([declare("accuracy")], outputs, step_state, batch)
    packed = metrics.packing.pack(metrics.init())
    packed = metrics.add(packed, outputs, step_state, batch)
    values = metrics.compute(metrics.packing.unpack(packed))

Invariant: the structure, shapes and dtypes of the accumulators never change, so that a compiled
loop can carry them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from jaxloop._core.arrays import state_signature
from jaxloop._core.batch import Signature
from jaxloop._core.types import PyTree
from jaxloop.metrics.accumulators import cast_like, strongly_typed
from jaxloop.metrics.declare import Derived
from jaxloop.metrics.derived import with_derived
from jaxloop.metrics.inputs import Inputs
from jaxloop.metrics.packing import Packed, Packing

SKIPPED = "skipped_steps"
"""The name of the output, 0 or 1, of a step that may leave its state unchanged, and of the metric
that counts it."""

Accumulators = dict[str, PyTree]
"""One accumulator for each metric, by name."""


@dataclass(frozen=True)
class Slot:
    """One metric that is bound to its inputs."""

    name: str
    init: Callable[[], PyTree]
    update: Callable[[PyTree, Inputs], PyTree]
    merge: Callable[[PyTree, PyTree], PyTree]
    compute: Callable[[PyTree], PyTree]
    delta: Callable[[Inputs], PyTree] | None = None
    """What a batch adds, if the accumulator is a sum; see `jaxloop.metrics.sums`."""


@dataclass(frozen=True)
class Metrics:
    """Metrics that are bound to the names and shapes of one loop; see `bind`.

    Attributes:
        slots: The accumulated metrics, in the order in which they were declared.
        derived: The derived metrics, each after those that it reads.
    """

    slots: tuple[Slot, ...]
    derived: tuple[tuple[str, Derived], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the values, the derived ones last."""
        return tuple(slot.name for slot in self.slots) + tuple(name for name, _ in self.derived)

    def init(self) -> Accumulators:
        """Returns empty accumulators."""
        return {slot.name: strongly_typed(slot.init()) for slot in self.slots}

    @functools.cached_property
    def empty(self) -> Accumulators:
        """Empty accumulators, with shapes in place of arrays."""
        shapes: Accumulators = jax.eval_shape(self.init)
        return shapes

    @property
    def shapes(self) -> Signature:
        """The structure, shapes and dtypes of the accumulators."""
        return state_signature(self.empty)

    @functools.cached_property
    def packing(self) -> Packing:
        """The places of the accumulators in one vector."""
        sums = [slot.name for slot in self.slots if slot.delta is not None]
        return Packing(self.empty, sums)

    def add(self, packed: Packed, outputs: PyTree, step_state: PyTree, batch: PyTree) -> Packed:
        """Adds a batch of any size to packed accumulators.

        If the step reports `SKIPPED` as 1, only the metric of that name changes.

        Args:
            packed: The accumulators, packed by `packing`.
            outputs: The outputs that the step reports.
            step_state: The step state.
            batch: The batch. Only its number of examples is read.

        Raises:
            ShapeError: A metric returned another structure, shape or dtype than in `bind`.
        """
        inputs = Inputs.of(outputs, step_state, batch)
        accs = self.packing.others(packed)
        deltas, others = {}, {}
        for slot in self.slots:
            if slot.delta is not None:
                deltas[slot.name] = slot.delta(inputs)
            else:
                others[slot.name] = slot.update(accs[slot.name], inputs)
        new = self.packing.add(packed, deltas, others)
        skipped = inputs.reported.get(SKIPPED)
        if skipped is None:
            return new
        return self.packing.kept(skipped != 0, packed, new, but=SKIPPED)

    def update(
        self, accs: Mapping[str, PyTree], outputs: PyTree, step_state: PyTree, batch: PyTree
    ) -> Accumulators:
        """Adds a batch to accumulators that are not packed; see `add`."""
        packed = self.add(self.packing.pack(accs), outputs, step_state, batch)
        return self.packing.unpack(packed)

    def merge(self, a: Mapping[str, PyTree], b: Mapping[str, PyTree]) -> Accumulators:
        """Combines two sets of accumulators, where ``b`` is the later one."""
        return {
            slot.name: cast_like(slot.name, slot.merge(a[slot.name], b[slot.name]), a[slot.name])
            for slot in self.slots
        }

    def compute(self, accs: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Returns the value of each accumulated metric by name.

        Exact integers and their quotients are an `ExactInt` and an `ExactRatio`. `host_rows`
        converts them.
        """
        return {slot.name: slot.compute(accs[slot.name]) for slot in self.slots}

    def with_derived(self, values: dict[str, PyTree]) -> dict[str, PyTree]:
        """Returns values on the host together with those of the derived metrics."""
        return with_derived(self.derived, values) if self.derived else values
