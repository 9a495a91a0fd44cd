"""Predictions alone: what the model gets of a batch, and the whole of its state.

    criterion = Predictions(BatchFields(inputs="image"))
    init_fn, step_fn = evaluation_steps(adapter, criterion, kind)
    model_state = merge_state(state_like(adapter, criterion, signature), given, complete=True)
    prediction = step_fn(batch, eval_state(model_state)).outputs["y_pred"]

Invariant: only the inputs are read, so a batch needs no targets, and weights change nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxloop._core.batch import Signature
from jaxloop._core.types import PyTree
from jaxloop._supervised.criterion import Judged
from jaxloop._supervised.fields import BatchFields, BatchParts
from jaxloop._supervised.init import Evidence
from jaxloop._supervised.models import BoundModel, ModelAdapter
from jaxloop._supervised.training import initialized_state
from jaxloop.errors import DataError


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A criterion that judges nothing: it reports the predictions.

    Attributes:
        fields: The parts of a batch.
    """

    fields: BatchFields

    def parts(self, batch: PyTree) -> BatchParts:
        """Returns the inputs of the model.

        Raises:
            DataError: Nothing says what the model gets of such a batch.
        """
        if self.fields.inputs is not None:
            return self.fields.read(batch)
        if isinstance(batch, tuple | list) and len(batch) in (1, 2, 3):
            return BatchParts((batch[0],), {}, None, None)
        if jax.tree_util.all_leaves([batch]):
            return BatchParts((batch,), {}, None, None)
        names = f"a {type(batch).__name__}"
        if isinstance(batch, Mapping):
            names += f" with {', '.join(map(repr, batch)) or 'nothing'}"
        raise DataError(
            f"a batch for a prediction must be x, (x, y) or (x, y, weight), got {names}",
            fix="say what the model gets with inputs=, such as inputs='image', or "
            "inputs=lambda batch: batch for all of it",
        )

    def num_examples(self, batch: Signature) -> int | None:
        """Returns the size of the first axis of the inputs, or None if they have not one size."""

        def inputs(value: PyTree) -> PyTree:
            parts = self.parts(value)
            return parts.args, parts.kwargs

        shapes = jax.tree.leaves(jax.eval_shape(inputs, shapes_of(batch)))
        sizes = {leaf.shape[:1] for leaf in shapes}
        [size] = sizes if len(sizes) == 1 else [()]
        return size[0] if size else None

    def initialize(self, bound: BoundModel, batch: PyTree) -> None:
        """See `Criterion`."""
        parts = self.parts(batch)
        bound.initialize(*parts.args, **parts.kwargs)

    def evidence(self, bind: Callable[[], BoundModel], batch: PyTree) -> Evidence | None:
        """See `Criterion`."""
        return None

    def __call__(self, bound: BoundModel, batch: PyTree, *, train: bool, key: jax.Array) -> Judged:
        """See `Criterion`."""
        parts = self.parts(batch)
        prediction = bound.predict(*parts.args, **parts.kwargs)
        return Judged(jnp.zeros(()), jnp.zeros(()), {"y_pred": prediction})


def state_like(adapter: ModelAdapter, criterion: Predictions, batch: Signature) -> PyTree:
    """Returns the state of a model, with shapes in place of arrays that it does not hold.

    Nothing is compiled.

    Args:
        adapter: The model.
        criterion: What is predicted.
        batch: The signature of a batch.
    """
    key = jax.random.key(0)
    if adapter.holds_state:
        return adapter.init(key, lambda bound: None)
    return jax.eval_shape(lambda x: initialized_state(adapter, criterion, key, x), shapes_of(batch))


def shapes_of(batch: Signature) -> PyTree:
    """Returns a batch with shapes in place of arrays."""
    return batch.tree.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in batch.leaves])
