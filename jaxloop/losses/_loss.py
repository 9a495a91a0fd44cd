"""The `Loss` type: a function of ``(y_true, y_pred)``, and what jaxloop knows about it.

    loss = Loss("gap", lambda y_true, y_pred: abs(y_true - y_pred))

Invariant: a `Loss` takes ``(y_true, y_pred)``, in this order, whatever its function takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import jax
from jax.typing import ArrayLike

from jaxloop._core.types import PyTree

LossFn: TypeAlias = Callable[..., ArrayLike]
"""``(y_true, y_pred) -> (batch,)``, ``(batch, *rest)`` or a scalar."""


class Labels(NamedTuple):
    """The labels of a loss that takes class numbers.

    Attributes:
        numbers: The labels, ``(batch, *rest)``.
        valid: Which of them are a class, a bool array of the same shape.
        num_classes: The number of classes.
    """

    numbers: jax.Array
    valid: jax.Array
    num_classes: int


LabelsFn: TypeAlias = Callable[[PyTree, PyTree], list[Labels]]
"""``(y_true, y_pred) -> labels``. Only the shapes of ``y_pred`` are read."""


class Sums(NamedTuple):
    """A loss of a whole data set, computed from sums over its examples.

    Attributes:
        terms: ``(y_true, y_pred) -> terms``, a pytree of arrays with a leading batch axis.
        finish: ``(sums of the terms, sum of the weights) -> value``, a scalar.
    """

    terms: Callable[[ArrayLike, ArrayLike], PyTree]
    finish: Callable[[PyTree, jax.Array], jax.Array]


@dataclass(frozen=True)
class Loss:
    """A loss function with a name.

    Attributes:
        name: Its name in error messages.
        fn: ``(y_true, y_pred) -> (batch,)``, ``(batch, *rest)`` or a scalar.
        probabilities: Whether ``y_pred`` must be probabilities.
        labels: Reads the labels, if they are class numbers.
        sums: If the loss of a data set is not the mean over its examples, how to compute it.
        batchwise: Whether the loss has a value for a batch only, and none for a data set.

    Example:
        >>> Loss("gap", lambda y_true, y_pred: abs(y_true - y_pred)).name
        'gap'
    """

    name: str
    fn: LossFn
    probabilities: bool = False
    labels: LabelsFn | None = None
    sums: Sums | None = None
    batchwise: bool = False
