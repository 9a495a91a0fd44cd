"""What a step computes from an objective: its loss, the weights, and what it reports.

    criterion = ObjectiveCriterion(objective(fn), BatchFields())
    judged = criterion(bound, batch, train=True, key=key)

Invariant: the shape of the loss says what it is a value of. It is one value per example, one per
element together with weights of its shape, or a scalar. Any other shape is an error, because it is
mostly a broadcast by accident.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import losses
from jaxloop._core.types import PyTree
from jaxloop._supervised.absent import finite_where_absent
from jaxloop._supervised.criterion import Judged, amount_of
from jaxloop._supervised.fields import BatchFields, read
from jaxloop._supervised.models import BoundModel
from jaxloop.errors import ArgumentError, ArgumentTypeError, ShapeError, unknown_name
from jaxloop.losses import Objective
from jaxloop.metrics import SKIPPED
from jaxloop.metrics.weights import leading_axis

_RESERVED = frozenset({"loss", "num_examples", SKIPPED})
"""Names that the step itself reports."""


@dataclasses.dataclass(frozen=True)
class ObjectiveCriterion:
    """An `Objective` as a `Criterion`.

    Attributes:
        loss: The objective.
        fields: The parts of a batch: the weights, and the inputs for the initialization.
    """

    loss: Objective
    fields: BatchFields

    def __post_init__(self) -> None:
        if self.fields.targets is not None:
            raise ArgumentError(
                "targets= must be left out with an objective, which reads the batch itself, got "
                f"targets={self.fields.targets!r}",
                fix="use the targets in the objective; report them as y_true for metrics",
            )

    def initialize(self, bound: BoundModel, batch: PyTree) -> None:
        """See `Criterion`."""
        if self.fields.inputs is None:
            self._call(bound, batch, train=True, key=jax.random.key(0))
        else:
            parts = self.fields.read(batch)
            bound.initialize(*parts.args, **parts.kwargs)

    def evidence(self, bind: Callable[[], BoundModel], batch: PyTree) -> None:
        """See `Criterion`."""

    def __call__(self, bound: BoundModel, batch: PyTree, *, train: bool, key: jax.Array) -> Judged:
        """See `Criterion`."""
        weight = None
        if self.fields.weights is not None:
            weight = jnp.asarray(read(batch, self.fields.weights, "weights"))
            batch = finite_where_absent(batch, weight)
        loss, outputs = self._result(self._call(bound, batch, train=train, key=key))
        if "sample_weight" in outputs:
            if weight is not None:
                raise ArgumentError(
                    f"{self._title} must not return a sample_weight if weights= is given, got both",
                    fix="leave out one of them",
                )
            weight = jnp.asarray(outputs["sample_weight"])
        num_examples = self._check_shape(loss, weight, batch)
        if weight is not None:
            outputs["sample_weight"] = weight
            loss, flat = loss.reshape(-1), weight.reshape(-1)
            mean = losses.reduce(loss, flat, flat.size)
        else:
            mean = losses.reduce(loss, None, loss.shape[0] if loss.ndim else 1)
            if num_examples != leading_axis(batch):
                outputs["num_examples"] = jnp.int32(num_examples)
        return Judged(mean, amount_of(weight, num_examples), {**outputs, "loss": mean})

    @property
    def _title(self) -> str:
        return f"the objective `{self.loss.name}`"

    def _call(self, bound: BoundModel, batch: PyTree, *, train: bool, key: jax.Array) -> Any:
        asked: dict[str, Any] = {"key": key} if self.loss.key else {}
        if self.loss.train:
            asked["train"] = train
        try:
            return self.loss.fn(bound.view, batch, **asked)
        except KeyError as error:
            _explain_missing(error, batch)
            raise

    def _result(self, result: Any) -> tuple[jax.Array, dict[str, PyTree]]:
        """Returns the loss and the reported values.

        Raises:
            ArgumentTypeError: The objective returned something else.
            ArgumentError: A reported name is taken.
        """
        loss, outputs = result, {}
        if isinstance(result, tuple | list):
            if len(result) != 2 or not isinstance(result[1], Mapping):
                raise self._wrong_result(
                    f"a {type(result).__name__} of {', '.join(type(x).__name__ for x in result)}"
                )
            loss, outputs = result[0], dict(result[1])
        if not isinstance(loss, jax.Array | int | float) and not hasattr(loss, "dtype"):
            raise self._wrong_result(f"a {type(loss).__name__} as the loss")
        for name in outputs:
            if not isinstance(name, str):
                raise self._wrong_result(f"the name {name!r}, which is not a string")
        taken = sorted(_RESERVED & outputs.keys())
        if taken:
            raise ArgumentError(
                f"{self._title} must not report {taken[0]!r}, which the trainer reports",
                fix="give the value another name",
            )
        array = jnp.asarray(loss)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise self._wrong_result(f"a loss of dtype {array.dtype}")
        return array, outputs

    def _wrong_result(self, got: str) -> ArgumentTypeError:
        return ArgumentTypeError(
            f"{self._title} must return a loss, or a loss and a dict of values to report, "
            f"got {got}",
            fix="return loss, or (loss, {'name': value}), with a real floating-point loss",
        )

    def _check_shape(self, loss: jax.Array, weight: ArrayLike | None, batch: PyTree) -> int:
        """Returns the number of examples that the loss counts for.

        Raises:
            ShapeError: The loss is neither a scalar nor one value per example or element.
        """
        if weight is not None:
            if loss.shape != jnp.shape(weight) or not loss.ndim:
                raise ShapeError(
                    f"{self._title} must return one value per element when the batch has weights, "
                    f"of their shape {jnp.shape(weight)}, got a loss of shape {loss.shape}",
                    fix="return a loss and weights of one shape; a mean over more than one element "
                    "cannot be weighted exactly",
                )
            return int(loss.size)
        lengths = [jnp.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf)]
        if loss.ndim == 0:
            return lengths[0] if lengths else 1
        if loss.ndim == 1 and (loss.shape[0] in lengths):
            return loss.shape[0]
        raise ShapeError(
            f"{self._title} must return one value per example, "
            f"({lengths[0] if lengths else 'batch'},), or a scalar, got shape {loss.shape}",
            fix="reduce the loss to one value per example; check that no two arrays broadcast, as "
            "(batch, 1) and (batch,) do; for one value per element, report a sample_weight of its "
            "shape",
        )


def _explain_missing(error: KeyError, batch: PyTree) -> None:
    """Adds to an error about a name that a batch does not have the names that it has."""
    name = error.args[0] if error.args else None
    if isinstance(batch, Mapping) and isinstance(name, str) and name not in batch:
        known = [one for one in batch if isinstance(one, str)]
        error.add_note(f"jaxloop: {unknown_name('part of the batch', name, known)}")
