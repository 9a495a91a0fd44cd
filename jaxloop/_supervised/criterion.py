"""A criterion: what a step computes from a model and a batch. A plain loss, or predictions alone.

    criterion = PlainLoss(losses.get("mean_squared_error"), BatchFields())
    initialized = adapter.init(key, lambda bound: criterion.initialize(bound, batch))
    judged = criterion(bound, batch, train=True, key=key)
    judged.loss, judged.outputs["y_pred"]

Invariant: an example of weight 0 changes neither the loss nor its gradient, even if its targets or
inputs are NaN. Only a model that mixes examples, as batch normalization does, still sees its
inputs, which are finite by then.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxloop import losses
from jaxloop._core.types import PyTree
from jaxloop._supervised.absent import finite_where_absent
from jaxloop._supervised.fields import BatchFields, BatchParts
from jaxloop._supervised.init import Evidence, evidence_of
from jaxloop._supervised.models import BoundModel
from jaxloop.errors import JaxloopError
from jaxloop.losses import Loss
from jaxloop.metrics.weights import leading_axis


class Judged(NamedTuple):
    """The result of a criterion for one batch.

    Attributes:
        loss: The weighted mean over the examples, a scalar. 0 if there is no loss.
        amount: The sum of the weights, or the number of examples, a float32 scalar. With it, the
            means of several batches add up to the mean over all of them.
        outputs: The values that the step reports.
    """

    loss: jax.Array
    amount: jax.Array
    outputs: dict[str, PyTree]


class Criterion(Protocol):
    """What a step computes from a model and a batch."""

    def initialize(self, bound: BoundModel, batch: PyTree) -> None:
        """Calls the model so that it makes its parameters."""

    def evidence(self, bind: Callable[[], BoundModel], batch: PyTree) -> Evidence | None:
        """Returns what the first batch shows about the model and the labels."""

    def __call__(self, bound: BoundModel, batch: PyTree, *, train: bool, key: jax.Array) -> Judged:
        """Returns the loss of a batch and what to report."""


@dataclasses.dataclass(frozen=True)
class PlainLoss:
    """A loss of targets and predictions, or None for predictions alone.

    Attributes:
        loss: The loss, or None.
        fields: The parts of a batch.
    """

    loss: Loss | None
    fields: BatchFields

    def parts(self, batch: PyTree) -> BatchParts:
        """Returns the parts of a batch, with finite inputs where examples are absent."""
        parts = self.fields.read(batch)
        args, kwargs = finite_where_absent((parts.args, parts.kwargs), parts.weight)
        return dataclasses.replace(parts, args=args, kwargs=kwargs)

    def initialize(self, bound: BoundModel, batch: PyTree) -> None:
        """See `Criterion`."""
        parts = self.parts(batch)
        bound.initialize(*parts.args, **parts.kwargs)

    def evidence(self, bind: Callable[[], BoundModel], batch: PyTree) -> Evidence | None:
        """See `Criterion`."""
        if self.loss is None:
            return None
        parts = self.parts(batch)

        def predict() -> PyTree:
            return bind().predict(*parts.args, **parts.kwargs)

        return evidence_of(self.loss, parts.targets, parts.weight, predict)

    def __call__(self, bound: BoundModel, batch: PyTree, *, train: bool, key: jax.Array) -> Judged:
        """See `Criterion`."""
        parts = self.parts(batch)
        prediction = bound.predict(*parts.args, **parts.kwargs)
        outputs: dict[str, PyTree] = {"y_true": parts.targets, "y_pred": prediction}
        if parts.weight is not None:
            outputs["sample_weight"] = parts.weight
        num_examples = leading_axis(parts.targets) or leading_axis((parts.args, parts.kwargs)) or 1
        loss = jnp.zeros(())
        if self.loss is not None:
            with _explaining():
                loss = losses.average(
                    self.loss, parts.targets, prediction, parts.weight, num_examples
                )
            outputs["loss"] = loss
        return Judged(loss, amount_of(parts.weight, num_examples), outputs)


@contextlib.contextmanager
def _explaining() -> Iterator[None]:
    """Adds to the error of a loss how it is called."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        if not isinstance(error, JaxloopError):
            error.add_note(
                "jaxloop: a loss is called as loss(y_true, y_pred); decorate one that takes "
                "(model, batch) with @jl.objective"
            )
        raise


def amount_of(weight: Any, num_examples: int) -> jax.Array:
    """Returns the sum of the weights, or the number of examples, as a float32 scalar."""
    if weight is None:
        return jnp.float32(num_examples)
    return jnp.sum(jnp.asarray(weight).astype(jnp.float32))
