"""Every loss as a metric: its value over the whole data set.

    metric = of_loss("huber")
    metric = of_loss(functools.partial(optax.huber_loss, delta=0.5))

Most losses are means over examples. A few are not: those with ``sums`` are computed from sums over
the examples, and those that compare the examples of one batch are errors. Invariant: the value does
not depend on how the data are split into batches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors, losses
from jaxloop._core.types import Better, PyTree
from jaxloop.losses import Loss, LossFn, Sums
from jaxloop.metrics.clu_protocol import CluMetric
from jaxloop.metrics.exact_sum import Pair, merge_pairs, sum_examples, sum_weights
from jaxloop.metrics.metric import Metric, mean
from jaxloop.metrics.weights import check_weight


@functools.lru_cache(maxsize=256)
def of_loss(loss: str | LossFn) -> Metric:
    """Makes a metric: a loss over the data set.

    It is the mean over the examples. For a loss of Optax that is not one
    (``multiclass_generalized_dice_loss``, or ``dice_loss`` with an ``axis`` over the batch), it is
    the loss of one batch that holds the whole data set.

    Args:
        loss: One of `losses.names`, or a function of ``(y_true, y_pred)`` or of `optax.losses`.

    Returns:
        A metric of ``(y_true, y_pred)``.

    Raises:
        UnknownNameError: No loss has this name.
        ArgumentError: The loss compares the examples of one batch, so a data set has no such value.

    Example:
        >>> of_loss("huber").name
        'huber'
    """
    found = losses.get(loss)
    if found.batchwise:
        raise _of_one_batch(found.name)
    if found.sums is not None:
        return _from_sums(loss, found.name, found.sums)
    values_fn = _ExampleValues(found.name, found.fn, scalars=False)
    return mean(values_fn, name=found.name, better=values_fn.better)


def resolve(
    metric: str | LossFn, found: Loss, *, accumulated: bool
) -> str | Metric | LossFn | type[CluMetric]:
    """Returns a metric for a loss that the user passed as a metric.

    Args:
        metric: The name or the function of the loss.
        found: The loss.
        accumulated: Whether the user chose how to combine the values of the batches. Then every
            loss has a value for each batch or each example.

    Raises:
        ArgumentError: The loss has no value over a data set.
    """
    if accumulated:
        if isinstance(metric, str) and not found.batchwise:
            return metric
        return _ExampleValues(found.name, found.fn, scalars=True)
    if found.batchwise:
        raise _of_one_batch(found.name)
    if found.sums is not None:
        return class_of_sums(metric)
    return metric if isinstance(metric, str) else of_loss(metric)


@dataclass(frozen=True)
class _ExampleValues:
    """A loss as a function of ``(y_true, y_pred)`` with one value per example.

    Attributes:
        name: The name of the loss.
        fn: The function of the loss.
        scalars: Whether the loss may return one value for the batch.
    """

    name: str
    fn: LossFn
    scalars: bool

    @property
    def better(self) -> Better:
        """Which values are better. Of the losses, only the cosine grows with agreement."""
        return "max" if self.name == "cosine_similarity" else "min"

    def __call__(self, *args: PyTree) -> ArrayLike:
        result = jnp.asarray(self.fn(*map(losses.widened, args)))
        if result.ndim == 0 and not self.scalars:
            raise _of_one_batch(self.name)
        return losses.per_example(result, result.shape[0]) if result.ndim else result


def _of_one_batch(name: str) -> errors.ArgumentError:
    return errors.ArgumentError(
        f"metric {name!r}: the loss must be a mean over examples, got a loss of its batch as a "
        "whole, whose average over the data would depend on the batch size",
        fix="use it as the loss of a trainer only, or pass accumulate='running_average' for the "
        "average of the batches' values",
    )


# --- losses that are not means over examples ------------------------------------------------------


class _SumsOf(NamedTuple):
    """The sums over some examples."""

    terms: PyTree
    total: Pair


def _sums_of(
    name: str, sums: Sums, y_true: ArrayLike, y_pred: ArrayLike, weight: ArrayLike | None
) -> _SumsOf:
    terms = sums.terms(y_true, y_pred)
    num_examples = jax.tree.leaves(terms)[0].shape[0]
    checked = check_weight(weight, num_examples, f"metric {name!r}")
    added = jax.tree.map(lambda term: sum_examples(term, checked), terms)
    return _SumsOf(added, sum_weights(checked, num_examples))


def _value(sums: Sums, acc: _SumsOf) -> jax.Array:
    terms = jax.tree.map(lambda pair: pair.hi, acc.terms, is_leaf=lambda x: isinstance(x, Pair))
    some = acc.total.hi != 0
    return jnp.where(some, sums.finish(terms, jnp.where(some, acc.total.hi, 1)), jnp.nan)


@dataclass(frozen=True)
class _AddToSums:
    """The update of a metric from sums.

    Attributes:
        loss: The name or the function of the loss.
    """

    loss: str | LossFn
    name: str
    sums: Sums

    def __call__(
        self,
        acc: _SumsOf | None,
        y_true: ArrayLike,
        y_pred: ArrayLike,
        *,
        weight: ArrayLike | None = None,
    ) -> _SumsOf | None:
        return _merge(acc, _sums_of(self.name, self.sums, y_true, y_pred, weight))


def _merge(a: _SumsOf | None, b: _SumsOf | None) -> _SumsOf | None:
    if a is None or b is None:
        return a if b is None else b
    merged: _SumsOf = merge_pairs(a, b)
    return merged


def _from_sums(loss: str | LossFn, name: str, sums: Sums) -> Metric:
    """Makes the metric for use outside a loop: its first update gives the sums their shapes."""

    def compute(acc: _SumsOf | None) -> jax.Array:
        return jnp.asarray(jnp.nan) if acc is None else _value(sums, acc)

    update = _AddToSums(loss, name, sums)
    return Metric(lambda: None, update, _merge, compute, name, better="min")


def carried(metric: Metric) -> Metric | type[CluMetric]:
    """Returns a metric whose accumulator has one structure from the start, for use in a loop."""
    if isinstance(metric.update, _AddToSums):
        return class_of_sums(metric.update.loss)
    return metric


@functools.lru_cache(maxsize=256)
def class_of_sums(loss: str | LossFn) -> type[CluMetric]:
    """Makes a class with the CLU protocol for a loss with `Sums`.

    A metric of this protocol gets the shapes of its accumulator from the first batch.
    """
    found = losses.get(loss)
    assert found.sums is not None
    sums: Sums = found.sums

    class OfSums(NamedTuple):
        terms: PyTree
        total: Pair

        @classmethod
        def from_model_output(
            cls, y_true: ArrayLike, y_pred: ArrayLike, sample_weight: ArrayLike | None = None
        ) -> OfSums:
            return cls(*_sums_of(found.name, sums, y_true, y_pred, sample_weight))

        def merge(self, other: OfSums) -> OfSums:
            merged: OfSums = merge_pairs(self, other)
            return merged

        def compute(self) -> jax.Array:
            return _value(sums, _SumsOf(*self))

    # An annotation in the class would make it a field.
    OfSums.better = "min"  # type: ignore[attr-defined]  # see `better_of`
    OfSums.__name__ = OfSums.__qualname__ = found.name
    return OfSums
