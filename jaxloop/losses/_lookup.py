"""The lookup of any loss: by name, as a function, or as a list for several outputs.

    loss = get("mean_squared_error")
    loss = get([("mean_squared_error", 1.0), ("hinge", 0.5)])

Invariant: every `Loss` takes ``(y_true, y_pred)``, in this order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.losses import _functions
from jaxloop.losses._averages import per_example
from jaxloop.losses._ctc import connectionist_temporal_classification
from jaxloop.losses._labels import class_numbers, sparse_labels, zero_or_one
from jaxloop.losses._loss import Labels, Loss, LossFn
from jaxloop.losses._objective import Objective
from jaxloop.losses._optax import of_optax, pairwise, unwrap
from jaxloop.losses._shapes import as_float

LossLike: TypeAlias = str | Loss | LossFn | Sequence[tuple[str | Loss | LossFn, float]]
"""A name, a function of ``(y_true, y_pred)``, one of Optax's, or a list of ``(loss, weight)``."""

_AXON: dict[str, LossFn] = {
    f.__name__: f
    for f in (
        _functions.binary_cross_entropy,
        _functions.categorical_cross_entropy,
        _functions.categorical_hinge,
        _functions.cosine_similarity,
        _functions.hinge,
        _functions.huber,
        _functions.kl_divergence,
        _functions.log_cosh,
        _functions.margin_ranking,
        _functions.mean_absolute_error,
        _functions.mean_squared_error,
        _functions.poisson,
        _functions.soft_margin,
    )
}
_AXON["connectionist_temporal_classification"] = connectionist_temporal_classification
_PROBABILITIES = frozenset({"binary_cross_entropy", "categorical_cross_entropy"})


def get(loss: LossLike) -> Loss:
    """Returns the `Loss` for a name, a function or a list of ``(loss, weight)``.

    Args:
        loss: One of `names` (Axon's meaning wins over Optax's), a function of ``(y_true, y_pred)``,
            a function of `optax.losses` (jaxloop recognizes it, also inside `functools.partial`,
            `jax.jit` and `functools.wraps`, and calls it in Optax's order of arguments), or a list
            of ``(loss, weight)``, one for each leaf of prediction and target. A loss of weight 0 is
            not computed.

    Returns:
        The loss.

    Raises:
        UnknownNameError: No loss has this name.
        ArgumentTypeError: ``loss`` is none of the above.

    Example:
        >>> get("mean_squared_error").name
        'mean_squared_error'
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss in _AXON:
            return _of_axon(_AXON[loss], loss, {})
        found = of_optax(pairwise()[loss], loss) if loss in pairwise() else None
        if found is not None:
            return found
        raise errors.unknown_name("loss", loss, names())
    if isinstance(loss, Objective):
        raise errors.ArgumentTypeError(
            f"an objective must be the whole loss, got `{loss.name}` as a part of one or as a "
            "metric",
            fix="call it inside another objective, and return its value in the dict to see it",
        )
    if isinstance(loss, list | tuple):
        return _weighted_sum(loss)
    if callable(loss):
        return _from_function(loss)
    raise errors.ArgumentTypeError(
        f"a loss must be a name, a function or a list of (loss, weight), got {loss!r}",
        fix="pass a loss such as 'mean_squared_error' or optax.l2_loss",
    )


def names() -> tuple[str, ...]:
    """Returns all names that `get` accepts, sorted.

    Example:
        >>> "huber" in names()
        True
    """
    return tuple(sorted({*_AXON, *pairwise()}))


def _from_function(fn: LossFn) -> Loss:
    found = of_optax(fn)
    if found is not None:
        return found
    core, keywords, transparent = unwrap(fn)
    name = str(getattr(core, "__name__", type(core).__name__))
    if transparent and _AXON.get(name) is core:
        return _of_axon(fn, name, keywords)
    return Loss(name, fn)


def _of_axon(fn: LossFn, name: str, keywords: Mapping[str, Any]) -> Loss:
    probabilities = name in _PROBABILITIES and not keywords.get("from_logits", False)
    labels = None
    if name == "binary_cross_entropy":
        labels = _binary_labels
    elif name == "categorical_cross_entropy" and keywords.get("sparse", False):
        labels = _sparse_labels
    return Loss(name, fn, probabilities, labels)


def _binary_labels(y_true: ArrayLike, y_pred: ArrayLike) -> list[Labels]:
    return [Labels(jnp.asarray(y_true), zero_or_one(y_true), 2)]


def _sparse_labels(y_true: ArrayLike, y_pred: ArrayLike) -> list[Labels]:
    name, num_classes = "categorical_cross_entropy", jnp.shape(y_pred)[-1]
    labels = sparse_labels(name, y_true, y_pred)
    return [Labels(labels, class_numbers(name, labels, num_classes)[1], num_classes)]


def _weighted_sum(pairs: Sequence[Any]) -> Loss:
    if not pairs or not all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
        raise errors.ArgumentTypeError(
            f"a list of losses must be a list of (loss, weight), got {list(pairs)!r}",
            fix="pass a list such as [('mean_squared_error', 1.0), ('hinge', 0.5)]",
        )
    weights = [_number(weight) for _, weight in pairs]
    parts = tuple(zip((get(loss) for loss, _ in pairs), weights, strict=True))

    def paired(y_true: PyTree, y_pred: PyTree) -> list[tuple[Loss, float, Any, Any]]:
        targets, predictions = jax.tree.leaves(y_true), jax.tree.leaves(y_pred)
        if not len(targets) == len(predictions) == len(parts):
            raise errors.ShapeError(
                "the numbers of losses, predictions and targets must be equal, got "
                f"{len(parts)} losses for {len(predictions)} predictions and {len(targets)} "
                "targets",
                fix="pass one (loss, weight) for each leaf of prediction and target, in order",
            )
        pairs = zip(parts, targets, predictions, strict=True)
        return [(loss, weight, target, prediction) for (loss, weight), target, prediction in pairs]

    def summed(y_true: PyTree, y_pred: PyTree) -> jax.Array:
        values = []
        for loss, weight, target, prediction in paired(y_true, y_pred):
            # A loss of weight 0 is not there. Infinity times 0 would be NaN.
            absent = jnp.zeros(jnp.shape(target)[:1])
            value = as_float(loss.fn(target, prediction) if weight else absent)
            values.append(per_example(value, value.shape[0]) if value.ndim else value)
        if any(v.ndim == 0 for v in values):
            # If one loss is a scalar, the sum is a scalar too, so that `reduce` rejects weights. A
            # scalar that was broadcast to the examples would accept weights and ignore them.
            values = [jnp.mean(v) for v in values]
        with jax.numpy_dtype_promotion("standard"):
            dtype = functools.reduce(jnp.promote_types, (v.dtype for v in values))
        terms = [
            value.astype(dtype) * jnp.asarray(weight, dtype)
            for (_, weight), value in zip(parts, values, strict=True)
        ]
        return functools.reduce(jnp.add, terms)

    def labels(y_true: PyTree, y_pred: PyTree) -> list[Labels]:
        found: list[Labels] = []
        for loss, weight, target, prediction in paired(y_true, y_pred):
            if loss.labels is not None and weight:
                found += loss.labels(target, prediction)
        return found

    name = " + ".join(f"{weight:g} {loss.name}" for loss, weight in parts)
    takes_labels = any(loss.labels is not None for loss, _ in parts)
    return Loss(
        name,
        summed,
        any(loss.probabilities for loss, _ in parts),
        labels if takes_labels else None,
        batchwise=any(loss.batchwise or loss.sums is not None for loss, _ in parts),
    )


def _number(weight: Any) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    # A string such as "1" is a number to `float`, but the name of a loss in the wrong place here.
    if isinstance(weight, str) or not math.isfinite(number):
        raise errors.ArgumentTypeError(
            f"the weight of a loss must be a finite number, got {weight!r}",
            fix="pass (loss, weight), in this order, such as ('mean_squared_error', 1.0)",
        )
    return number
