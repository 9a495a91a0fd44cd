"""The init function of a supervised loop, in three parts of which only one is compiled.

    init_fn = SupervisedInit(make_state, adapter.load, loss)
    prepared = init_fn.prepare(init_state)                    # arrays, before the trace
    state, evidence = jax.jit(init_fn.fn)(batch, prepared)
    init_fn.check(evidence)                                   # raises, after the computation

Invariant: ``prepare`` turns the state that the user passes, such as an NNX module, into a pytree of
arrays, so that ``fn`` can be compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentError, DataError
from jaxloop.losses import Labels, Loss


class Evidence(NamedTuple):
    """What the first batch shows about the model and the labels. None is nothing to check.

    Attributes:
        probabilities: Whether the predictions can be probabilities.
        labels: For each array of labels, ``(all are classes, one that is not, num_classes)``.
    """

    probabilities: jax.Array | None = None
    labels: tuple[tuple[jax.Array, jax.Array, jax.Array], ...] = ()


@dataclasses.dataclass(frozen=True)
class SupervisedInit:
    """An init function that prepares the user's state, makes the step state, and checks the model.

    Attributes:
        fn: ``(batch, prepared) -> (state, evidence)``, a pure function.
        load: Turns the state that the user passed to `run` into (a part of) a model state.
        loss: The loss, for the check. None if nothing is checked.
    """

    fn: Callable[[PyTree, PyTree], tuple[PyTree, Evidence | None]]
    load: Callable[[Any], PyTree]
    loss: Loss | None = None

    def __call__(self, batch: PyTree, init_state: Any = None) -> PyTree:
        """Returns the first step state, without a check."""
        return self.fn(batch, self.prepare(init_state))[0]

    def prepare(self, init_state: Any) -> PyTree:
        """Converts the ``init_state`` passed to `run` to arrays that `jax.jit` accepts."""
        return self.load(init_state)

    def check(self, evidence: Evidence | None) -> None:
        """Checks that predictions and labels of the first batch are what the loss takes.

        Raises:
            ArgumentError: The loss takes probabilities, and the predictions are not.
            DataError: A label of an example whose weight is not 0 is not a class.
        """
        if self.loss is None or evidence is None:
            return
        for valid, label, num_classes in evidence.labels:
            if not bool(np.asarray(valid)):
                raise DataError(
                    f"the labels for the loss {self.loss.name!r} must be class numbers from 0 to "
                    f"{int(num_classes) - 1}, got {np.asarray(label)} in the first batch",
                    fix="correct the labels, or give examples without a label the weight 0, as "
                    "in batches of (x, y, y >= 0)",
                )
        if evidence.probabilities is None or bool(np.asarray(evidence.probabilities)):
            return
        raise ArgumentError(
            f"the loss {self.loss.name!r} takes probabilities, so the model's predictions must be "
            "in [0, 1] and sum to 1 over the classes, got other values for the first batch",
            fix="if the model returns logits, use from_logits=True (for example "
            "functools.partial(jl.losses.categorical_cross_entropy, from_logits=True)) or "
            "optax.softmax_cross_entropy, optax.sigmoid_binary_cross_entropy",
        )


def evidence_of(
    loss: Loss, y: PyTree, weight: ArrayLike | None, predict: Callable[[], PyTree]
) -> Evidence | None:
    """Returns what one batch shows.

    Args:
        loss: The loss.
        y: The targets.
        weight: The weights, or None.
        predict: Returns the predictions. They are computed only if the loss takes probabilities.
    """
    if loss.labels is None and not loss.probabilities:
        return None
    probabilities = None
    labels: tuple[tuple[jax.Array, jax.Array, jax.Array], ...] = ()
    prediction = predict() if loss.probabilities else jax.eval_shape(predict)
    if loss.probabilities:
        probabilities = may_be_probabilities(loss, prediction)
    if loss.labels is not None:
        labels = tuple(_worst(found, weight) for found in loss.labels(y, prediction))
    return Evidence(probabilities, labels)


def _worst(labels: Labels, weight: ArrayLike | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns whether all labels are classes, one that is not, and the number of classes."""
    wrong = ~labels.valid
    if weight is not None and jnp.shape(weight) == wrong.shape[: jnp.ndim(weight)]:
        present = jnp.asarray(weight).astype(jnp.bool_)
        wrong &= present.reshape(*present.shape, *(1,) * (wrong.ndim - present.ndim))
    # A first number makes the arrays nonempty.
    wrong = jnp.concatenate([jnp.zeros(1, jnp.bool_), wrong.reshape(-1)])
    numbers = jnp.concatenate([jnp.zeros(1, labels.numbers.dtype), labels.numbers.reshape(-1)])
    return ~jnp.any(wrong), numbers[jnp.argmax(wrong)], jnp.asarray(labels.num_classes)


def may_be_probabilities(loss: Loss, prediction: PyTree) -> jax.Array:
    """Returns whether the predictions for one batch can be probabilities, a boolean scalar."""
    checks = []
    for leaf in jax.tree.leaves(prediction):
        p = leaf.astype(jnp.float32)
        good = jnp.isnan(p) | ((p >= -1e-6) & (p <= 1 + 1e-6))
        checks.append(jnp.all(good))
        if "categorical" in loss.name and p.ndim > 1 and p.shape[-1] > 1:
            sums = jnp.sum(p, -1)
            checks.append(jnp.all(jnp.isnan(sums) | (jnp.abs(sums - 1) < 1e-2)))
    return jnp.all(jnp.stack(checks)) if checks else jnp.bool_(True)
