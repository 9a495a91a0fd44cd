"""The lookup of any loss: by name, as a function, or as a list for several outputs.

    loss = get("mean_squared_error")
    loss = get([("mean_squared_error", 1.0), ("hinge", 0.5)])

Invariant: every `Loss` takes ``(y_true, y_pred)``, in this order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.losses import _functions
from jaxloop.losses._averages import per_example
from jaxloop.losses._shapes import as_float, same_shape

LossFn: TypeAlias = Callable[..., ArrayLike]
"""``(y_true, y_pred) -> (batch,)``, ``(batch, *rest)`` or a scalar."""


@dataclass(frozen=True)
class Loss:
    """A loss function with a name.

    Attributes:
        name: Its name in error messages.
        fn: ``(y_true, y_pred) -> (batch,)``, ``(batch, *rest)`` or a scalar.
        probabilities: Whether ``y_pred`` must be probabilities.

    Example:
        >>> Loss("gap", lambda y_true, y_pred: abs(y_true - y_pred)).name
        'gap'
    """

    name: str
    fn: LossFn
    probabilities: bool = False


LossLike: TypeAlias = str | Loss | LossFn | Sequence[tuple[str | Loss | LossFn, float]]
"""A name, a function of ``(y_true, y_pred)``, one of Optax's, or a list of ``(loss, weight)``."""

_AXON: dict[str, LossFn] = {
    f.__name__: f
    for f in (
        _functions.binary_cross_entropy,
        _functions.categorical_cross_entropy,
        _functions.categorical_hinge,
        _functions.connectionist_temporal_classification,
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
_PROBABILITIES = frozenset({"binary_cross_entropy", "categorical_cross_entropy"})

# Optax's losses whose targets are class numbers, with one axis less than the predictions.
_OPTAX_INTEGER_LABELS = frozenset(
    {
        "softmax_cross_entropy_with_integer_labels",
        "multiclass_hinge_loss",
        "multiclass_perceptron_loss",
        "multiclass_sparsemax_loss",
    }
)
# Public in `optax.losses`, but not a loss of one prediction and one target.
_OPTAX_NOT_PAIRWISE = frozenset(
    {
        "ctc_loss",
        "ctc_loss_with_forward_probs",
        "make_fenchel_young_loss",
        "smooth_labels",
        "triplet_margin_loss",
    }
)
# These do not compare targets element by element, so Optax checks the shapes.
_OPTAX_FREE_SHAPES = frozenset({"ntxent"})


def get(loss: LossLike) -> Loss:
    """Returns the `Loss` for a name, a function or a list of ``(loss, weight)``.

    Args:
        loss: One of `names` (Axon's meaning wins over Optax's), a function of ``(y_true, y_pred)``,
            a function of `optax.losses` (jaxloop recognizes it and calls it in Optax's order of
            arguments), or a list of ``(loss, weight)``, one for each leaf of prediction and target.

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
            return Loss(loss, _AXON[loss], loss in _PROBABILITIES)
        optax_losses = _optax_losses()
        if loss in optax_losses:
            return _from_optax(optax_losses[loss], loss)
        raise errors.unknown_name("loss", loss, names())
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
    return tuple(sorted({*_AXON, *_optax_losses()}))


@functools.cache
def _optax_losses() -> dict[str, LossFn]:
    """Returns the losses of `optax.losses` that take one prediction and one target."""
    # Imported here, so that `import jaxloop` does not import Optax.
    import optax

    found = {n: f for n, f in vars(optax.losses).items() if callable(f) and not n.startswith("_")}
    return {n: f for n, f in found.items() if n not in _OPTAX_NOT_PAIRWISE}


def _from_function(fn: LossFn) -> Loss:
    core: Any = fn
    keywords: dict[str, Any] = {}
    while isinstance(core, functools.partial):
        keywords = {**core.keywords, **keywords}
        core = core.func
    name = str(getattr(core, "__name__", type(core).__name__))
    if _AXON.get(name) is core:
        takes = name in _PROBABILITIES and not keywords.get("from_logits", False)
        return Loss(name, fn, takes)
    # The function's module shows whether it is from Optax, without importing Optax.
    if str(getattr(core, "__module__", "")).split(".")[0] == "optax":
        if name in _OPTAX_NOT_PAIRWISE:
            raise errors.ArgumentTypeError(
                f"a loss must take one prediction and one target, got optax's {name}",
                fix="wrap it in a function of (y_true, y_pred)",
            )
        return _from_optax(fn, name)
    return Loss(name, fn)


def _from_optax(fn: LossFn, name: str) -> Loss:
    def swapped(y_true: ArrayLike, y_pred: ArrayLike) -> ArrayLike:
        y_pred, y_true = as_float(y_pred), jnp.asarray(y_true)
        if name in _OPTAX_INTEGER_LABELS:
            if y_true.shape != y_pred.shape[:-1]:
                raise errors.ShapeError(
                    f"{name}: y_true must hold class numbers, with the shape of y_pred without "
                    f"its last axis, got y_true {y_true.shape} and y_pred {y_pred.shape}",
                    fix="pass one class number per example",
                )
        elif name not in _OPTAX_FREE_SHAPES:
            y_true, y_pred = same_shape(name, y_true, y_pred)
        # Optax mixes ranks and dtypes internally, even if the user forbids promotion.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return fn(y_pred, y_true)

    return Loss(name, swapped)


def _weighted_sum(pairs: Sequence[Any]) -> Loss:
    if not pairs or not all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
        raise errors.ArgumentTypeError(
            f"a list of losses must be a list of (loss, weight), got {list(pairs)!r}",
            fix="pass a list such as [('mean_squared_error', 1.0), ('hinge', 0.5)]",
        )
    for _, weight in pairs:
        if isinstance(weight, str | list | tuple) or callable(weight):
            raise errors.ArgumentTypeError(
                f"the weight of a loss must be a number, got {weight!r}",
                fix="pass (loss, weight), in this order",
            )
    parts = tuple((get(loss), weight) for loss, weight in pairs)

    def summed(y_true: PyTree, y_pred: PyTree) -> jax.Array:
        targets, predictions = jax.tree.leaves(y_true), jax.tree.leaves(y_pred)
        if not len(targets) == len(predictions) == len(parts):
            raise errors.ShapeError(
                "the numbers of losses, predictions and targets must be equal, got "
                f"{len(parts)} losses for {len(predictions)} predictions and {len(targets)} "
                "targets",
                fix="pass one (loss, weight) for each leaf of prediction and target, in order",
            )
        values = []
        for (loss, _), target, prediction in zip(parts, targets, predictions, strict=True):
            value = jnp.asarray(loss.fn(target, prediction))
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

    name = " + ".join(f"{weight:g} {loss.name}" for loss, weight in parts)
    return Loss(name, summed, any(loss.probabilities for loss, _ in parts))
