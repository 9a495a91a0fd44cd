"""Losses: per-example functions of ``(y_true, y_pred)``, and one way to look any loss up.

    loss = losses.get("mean_squared_error")          # or optax.l2_loss, or [(loss, weight), ...]
    value = losses.reduce(loss.fn(y_true, y_pred), sample_weight, num_examples)

Invariant: a loss of this file returns one value per example, ``(batch,)``, in the dtype of the
predictions, and never broadcasts targets against predictions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxloop import errors

LossFn = Callable[[Any, Any], Any]

_EPS = 1e-7

# The losses of Optax whose targets are class numbers: one axis less than the predictions.
_OPTAX_INTEGER_LABELS = frozenset(
    {
        "softmax_cross_entropy_with_integer_labels",
        "multiclass_hinge_loss",
        "multiclass_perceptron_loss",
        "multiclass_sparsemax_loss",
    }
)
# Public in `optax.losses`, but no loss of one prediction and one target.
_OPTAX_NOT_PAIRWISE = frozenset(
    {
        "ctc_loss",
        "ctc_loss_with_forward_probs",
        "make_fenchel_young_loss",
        "smooth_labels",
        "triplet_margin_loss",
    }
)
# Targets are not compared element by element, so their shape is Optax's business.
_OPTAX_FREE_SHAPES = frozenset({"ntxent"})


@dataclass(frozen=True)
class Loss:
    """A loss that is ready to be called.

    Attributes:
        name: What messages call it.
        fn: ``(y_true, y_pred) -> (batch,)``, ``(batch, *rest)`` or a scalar.
        probabilities: Whether ``y_pred`` must be probabilities.
    """

    name: str
    fn: LossFn
    probabilities: bool = False


def get(loss: str | LossFn | Loss | Sequence[tuple[Any, float]]) -> Loss:
    """The `Loss` that a name, a function or a list of ``(loss, weight)`` means.

    Args:
        loss: A name (Axon's meaning wins over Optax's), a function of ``(y_true, y_pred)``, a
            function of `optax.losses` (recognised, and called in Optax's own order), or a list of
            ``(loss, weight)``, one for each leaf of prediction and target.

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
    if isinstance(loss, (list, tuple)):
        return _several(loss)
    if callable(loss):
        return _from_function(loss)
    raise errors.ArgumentTypeError(
        f"a loss must be a name, a function or a list of (loss, weight); got {loss!r}",
        fix="pass for example 'mean_squared_error' or optax.l2_loss",
    )


def names() -> tuple[str, ...]:
    """All names that `get` knows, sorted."""
    return tuple(sorted({*_AXON, *_optax_losses()}))


def per_example(values: Any, num_examples: int) -> jax.Array:
    """One value per example: the mean over all axes but the first.

    Args:
        values: ``(batch, *rest)``, or a scalar, which is returned as it is.
        num_examples: The length of the batch axis.

    Returns:
        ``(batch,)``, or the scalar.

    Raises:
        ShapeError: ``values`` has another leading axis.
    """
    array = jnp.asarray(values)
    if array.ndim == 0:
        return array
    if array.shape[0] != num_examples:
        raise errors.ShapeError(
            f"a loss returned shape {array.shape} for a batch of {num_examples} examples",
            fix="return one value per example, or a scalar",
        )
    return _trailing_mean(array)


def reduce(loss_value: Any, sample_weight: Any, num_examples: int) -> jax.Array:
    """The weighted average of a loss over the examples, ``sum(l * w) / sum(w)``.

    The sum is made in float32 at least. Examples of weight 0 add nothing, whatever their value;
    when all weights are 0 the result is 0.

    Args:
        loss_value: ``(batch, *rest)`` or a scalar.
        sample_weight: ``(batch,)`` of bool, int or float, or None.
        num_examples: The length of the batch axis.

    Returns:
        A scalar.

    Raises:
        ShapeError: A scalar loss comes with weights, or a shape does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> float(reduce(jnp.array([1.0, 3.0]), jnp.array([1.0, 3.0]), 2))
        2.5
    """
    values = per_example(loss_value, num_examples)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(_float_dtype())
    values = values.astype(jnp.float64 if values.dtype == jnp.float64 else jnp.float32)
    if sample_weight is None:
        return values if values.ndim == 0 else jnp.mean(values)
    if values.ndim == 0:
        raise errors.ShapeError(
            "a scalar loss came together with sample weights (or a mask), which it cannot honour",
            fix="return one value per example",
        )
    weight = jnp.asarray(sample_weight)
    if weight.shape != (num_examples,):
        raise errors.ShapeError(
            f"sample_weight has shape {weight.shape}, expected ({num_examples},)",
            fix="give one weight per example",
        )
    weight = weight.astype(values.dtype)
    total = jnp.sum(jnp.where(weight == 0, 0, values * weight))
    norm = jnp.sum(weight)
    return jnp.where(norm == 0, 0, total / jnp.where(norm == 0, 1, norm))


# --- the losses, Axon's meaning ------------------------------------------------------------------


def binary_cross_entropy(y_true: Any, y_pred: Any, *, from_logits: bool = False) -> jax.Array:
    """The mean of ``-(y log p + (1 - y) log(1 - p))``.

    Args:
        y_true: ``(batch, *rest)`` of 0 and 1.
        y_pred: ``(batch, *rest)``, probabilities, or logits with ``from_logits``.
        from_logits: Whether ``y_pred`` is before the sigmoid.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.binary_cross_entropy`.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(binary_cross_entropy(jnp.array([1]), jnp.array([0.5]))[0]), 4)
        0.6931
    """
    y_true, y_pred = _pair("binary_cross_entropy", y_true, y_pred)
    if from_logits:
        # The log sigmoid is exact where a clipped probability is not.
        log_p, log_not_p = jax.nn.log_sigmoid(y_pred), jax.nn.log_sigmoid(-y_pred)
    else:
        # Clipped and shifted, as in Axon: in half precision 1 - eps is 1, and the shift saves it.
        y_pred = jnp.clip(y_pred, _EPS, 1 - _EPS)
        log_p, log_not_p = jnp.log(y_pred + _EPS), jnp.log(1 - y_pred + _EPS)
    return _trailing_mean(-(y_true * log_p + (1 - y_true) * log_not_p))


def categorical_cross_entropy(
    y_true: Any, y_pred: Any, *, from_logits: bool = False, sparse: bool = False
) -> jax.Array:
    """``-sum(y log p)`` over the classes, the last axis.

    Args:
        y_true: ``(batch, *rest, classes)``, or class numbers ``(batch, *rest)`` with ``sparse``.
        y_pred: ``(batch, *rest, classes)``, probabilities, or logits with ``from_logits``.
        from_logits: Whether ``y_pred`` is before the softmax.
        sparse: Whether ``y_true`` holds class numbers.

    Returns:
        ``(batch,)``, the mean over the axes between.

    Raises:
        ShapeError: The shapes do not fit, or integer labels came without ``sparse``.

    Source: `Axon.Losses.categorical_cross_entropy`.

    Example:
        >>> import jax.numpy as jnp
        >>> p = jnp.array([[0.5, 0.5]])
        >>> round(float(categorical_cross_entropy(jnp.array([1]), p, sparse=True)[0]), 4)
        0.6931
    """
    name = "categorical_cross_entropy"
    y_pred = _as_float(y_pred)
    y_true = jnp.asarray(y_true)
    if sparse:
        if y_true.shape == (*y_pred.shape[:-1], 1):
            y_true = y_true[..., 0]
        if y_true.shape != y_pred.shape[:-1] or y_pred.ndim == 0:
            raise errors.ShapeError(
                f"{name}: y_true has shape {y_true.shape} and y_pred {y_pred.shape}",
                fix="with sparse=True, y_true has the shape of y_pred without its last axis",
            )
        if not jnp.issubdtype(y_true.dtype, jnp.integer):
            raise errors.ShapeError(
                f"{name}: y_true is {y_true.dtype}, but sparse=True needs integer class numbers",
                fix="cast the labels to int32",
            )
    elif y_true.ndim == y_pred.ndim - 1 and y_true.shape == y_pred.shape[:-1]:
        raise errors.ShapeError(
            f"{name}: y_true has shape {y_true.shape} (class numbers?) and y_pred {y_pred.shape}",
            fix="pass sparse=True, one-hot encode the labels, or use "
            "optax.softmax_cross_entropy_with_integer_labels (which takes logits)",
        )
    else:
        y_true, y_pred = _pair(name, y_true, y_pred)
    log_p = jax.nn.log_softmax(y_pred) if from_logits else jnp.log(jnp.clip(y_pred, _EPS, 1))
    if sparse:
        return _trailing_mean(-jnp.take_along_axis(log_p, y_true[..., None], axis=-1)[..., 0])
    return _trailing_mean(-jnp.sum(y_true * log_p, axis=-1))


def categorical_hinge(y_true: Any, y_pred: Any) -> jax.Array:
    """``max(0, 1 + max((1 - y) p) - sum(y p))`` over the classes, ``(batch,)``.

    Source: `Axon.Losses.categorical_hinge`.
    """
    y_true, y_pred = _pair("categorical_hinge", y_true, y_pred)
    negative = jnp.max((1 - y_true) * y_pred, axis=-1)
    positive = jnp.sum(y_true * y_pred, axis=-1)
    return _trailing_mean(jnp.maximum(negative - positive + 1, 0))


def hinge(y_true: Any, y_pred: Any) -> jax.Array:
    """The mean of ``max(0, 1 - y p)``, with ``y`` of -1 and 1, ``(batch,)``.

    Source: `Axon.Losses.hinge`.
    """
    y_true, y_pred = _pair("hinge", y_true, y_pred)
    return _trailing_mean(jnp.maximum(1 - y_true * y_pred, 0))


def kl_divergence(y_true: Any, y_pred: Any) -> jax.Array:
    """``sum(y log(y / p))`` over the last axis, both clipped to ``[1e-7, 1]``, ``(batch,)``.

    Source: `Axon.Losses.kl_divergence`.
    """
    y_true, y_pred = _pair("kl_divergence", y_true, y_pred)
    y_true, y_pred = jnp.clip(y_true, _EPS, 1), jnp.clip(y_pred, _EPS, 1)
    return _trailing_mean(jnp.sum(y_true * jnp.log(y_true / y_pred), axis=-1))


def log_cosh(y_true: Any, y_pred: Any) -> jax.Array:
    """The mean of ``log(cosh(p - y))``, ``(batch,)``.

    Source: `Axon.Losses.log_cosh`, in the form that does not overflow.
    """
    y_true, y_pred = _pair("log_cosh", y_true, y_pred)
    # cosh is even, and exp(-2|x|) cannot overflow.
    x = jnp.abs(y_pred - y_true)
    return _trailing_mean(x + jnp.log1p(jnp.exp(-2 * x)) - jnp.log(jnp.asarray(2, x.dtype)))


def mean_absolute_error(y_true: Any, y_pred: Any) -> jax.Array:
    """The mean of ``|y - p|``, ``(batch,)``.

    Source: `Axon.Losses.mean_absolute_error`.
    """
    y_true, y_pred = _pair("mean_absolute_error", y_true, y_pred)
    return _trailing_mean(jnp.abs(y_true - y_pred))


def mean_squared_error(y_true: Any, y_pred: Any) -> jax.Array:
    """The mean of ``(y - p)**2``, ``(batch,)``.

    Source: `Axon.Losses.mean_squared_error`.

    Example:
        >>> import jax.numpy as jnp
        >>> mean_squared_error(jnp.zeros((1, 2)), jnp.array([[1.0, 3.0]])).tolist()
        [5.0]
    """
    y_true, y_pred = _pair("mean_squared_error", y_true, y_pred)
    return _trailing_mean(jnp.square(y_true - y_pred))


def poisson(y_true: Any, y_pred: Any) -> jax.Array:
    """The mean of ``p - y log(p + 1e-7)``, ``(batch,)``.

    Source: `Axon.Losses.poisson`.
    """
    y_true, y_pred = _pair("poisson", y_true, y_pred)
    return _trailing_mean(y_pred - y_true * jnp.log(y_pred + _EPS))


def soft_margin(y_true: Any, y_pred: Any) -> jax.Array:
    """The mean of ``log(1 + exp(-y p))``, with ``y`` of -1 and 1, ``(batch,)``.

    Source: `Axon.Losses.soft_margin`; Axon sums over the first axis, the batch, where this takes
    each example's mean, so that weights and masks can reach it.
    """
    y_true, y_pred = _pair("soft_margin", y_true, y_pred)
    return _trailing_mean(jax.nn.softplus(-y_true * y_pred))


def huber(y_true: Any, y_pred: Any, *, delta: float = 1.0) -> jax.Array:
    """The mean of ``d**2 / 2`` where ``d = |p - y| <= delta``, else ``delta (d - delta / 2)``.

    Args:
        y_true: ``(batch, *rest)``.
        y_pred: ``(batch, *rest)``.
        delta: Where the square ends and the line begins.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.huber`.
    """
    y_true, y_pred = _pair("huber", y_true, y_pred)
    distance = jnp.abs(y_pred - y_true)
    # The clipped form has no square of a large distance, whose overflow would spoil the gradient.
    near = jnp.minimum(distance, delta)
    return _trailing_mean(near * (distance - 0.5 * near))


def cosine_similarity(y_true: Any, y_pred: Any) -> jax.Array:
    """The cosine of the angle between the last axes, 1 where they agree, ``(batch,)``.

    Source: `Axon.Losses.cosine_similarity`: it grows with agreement, so negate it to minimize.
    """
    y_true, y_pred = _pair("cosine_similarity", y_true, y_pred)
    dot = jnp.sum(y_true * y_pred, axis=-1)
    # Guarded inside the root: the gradient of sqrt at 0 is infinite.
    squares = jnp.sum(jnp.square(y_true), axis=-1) * jnp.sum(jnp.square(y_pred), axis=-1)
    return _trailing_mean(dot / jnp.sqrt(jnp.maximum(squares, 1e-12)))


def margin_ranking(y_true: Any, y_pred: Any, *, margin: float = 0.0) -> jax.Array:
    """The mean of ``max(0, margin - y (p1 - p2))``.

    Args:
        y_true: ``(batch, *rest)``: 1 where the first shall rank higher, -1 where the second.
        y_pred: A pair of arrays ``(batch, *rest)``.
        margin: By how much.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.margin_ranking`.
    """
    if not isinstance(y_pred, (tuple, list)) or len(y_pred) != 2:
        raise errors.ShapeError(
            f"margin_ranking: y_pred must be a pair of arrays, got {type(y_pred).__name__}",
            fix="let the model return (scores_1, scores_2)",
        )
    y_true_1, first = _pair("margin_ranking", y_true, y_pred[0])
    _, second = _pair("margin_ranking", y_true, y_pred[1])
    return _trailing_mean(jnp.maximum(margin - y_true_1 * (first - second.astype(first.dtype)), 0))


def connectionist_temporal_classification(y_true: Any, y_pred: Any, *, blank: int = 0) -> jax.Array:
    """The negative log-likelihood of the target sequences over all alignments.

    Args:
        y_true: A pair ``(lengths (batch,), labels (batch, longest))`` of integers.
        y_pred: ``(batch, time, classes)`` log-probabilities (logits give the same).
        blank: The class that means no label.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.connectionist_temporal_classification`; computed by `optax.ctc_loss`.
    """
    import optax

    if not isinstance(y_true, (tuple, list)) or len(y_true) != 2:
        raise errors.ShapeError(
            "connectionist_temporal_classification: y_true must be a pair (lengths, labels)",
            fix="pass the number of labels of each sequence, then the padded labels",
        )
    y_pred = _as_float(y_pred)
    lengths, labels = jnp.asarray(y_true[0]), jnp.asarray(y_true[1])
    if y_pred.ndim != 3 or lengths.shape != y_pred.shape[:1] or labels.shape[:1] != lengths.shape:
        raise errors.ShapeError(
            f"connectionist_temporal_classification: lengths {lengths.shape}, labels "
            f"{labels.shape}, y_pred {y_pred.shape}",
            fix="pass lengths (batch,), labels (batch, longest), y_pred (batch, time, classes)",
        )
    padding = (jnp.arange(labels.shape[1])[None, :] >= lengths[:, None]).astype(y_pred.dtype)
    no_padding = jnp.zeros(y_pred.shape[:2], y_pred.dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        value = optax.ctc_loss(y_pred, no_padding, labels, padding, blank_id=blank)
    return jnp.asarray(value)


_AXON: dict[str, LossFn] = {
    f.__name__: f
    for f in (
        binary_cross_entropy,
        categorical_cross_entropy,
        categorical_hinge,
        connectionist_temporal_classification,
        cosine_similarity,
        hinge,
        huber,
        kl_divergence,
        log_cosh,
        margin_ranking,
        mean_absolute_error,
        mean_squared_error,
        poisson,
        soft_margin,
    )
}
_PROBABILITIES = frozenset({"binary_cross_entropy", "categorical_cross_entropy"})


# --- looking up ----------------------------------------------------------------------------------


@functools.cache
def _optax_losses() -> dict[str, LossFn]:
    """The losses of `optax.losses` that take one prediction and one target."""
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
    # Asked of the module's name first, so that a user without Optax never imports it.
    if str(getattr(core, "__module__", "")).split(".")[0] == "optax":
        if name in _OPTAX_NOT_PAIRWISE:
            raise errors.ArgumentTypeError(
                f"optax's {name} is not a loss of one prediction and one target",
                fix="wrap it in a function of (y_true, y_pred)",
            )
        return _from_optax(fn, name)
    return Loss(name, fn)


def _from_optax(fn: LossFn, name: str) -> Loss:
    def swapped(y_true: Any, y_pred: Any) -> Any:
        y_pred, y_true = _as_float(y_pred), jnp.asarray(y_true)
        if name in _OPTAX_INTEGER_LABELS:
            if y_true.shape != y_pred.shape[:-1]:
                raise errors.ShapeError(
                    f"{name}: y_true has shape {y_true.shape} and y_pred {y_pred.shape}",
                    fix="y_true holds class numbers, with the shape of y_pred without its last "
                    "axis",
                )
        elif name not in _OPTAX_FREE_SHAPES:
            y_true, y_pred = _pair(name, y_true, y_pred)
        # Optax mixes ranks and dtypes inside, which is its own affair under strict promotion.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return fn(y_pred, y_true)

    return Loss(name, swapped)


def _several(pairs: Sequence[Any]) -> Loss:
    if not pairs or not all(isinstance(p, (tuple, list)) and len(p) == 2 for p in pairs):
        raise errors.ArgumentTypeError(
            f"a list of losses must be a list of (loss, weight); got {list(pairs)!r}",
            fix="pass for example [('mean_squared_error', 1.0), ('hinge', 0.5)]",
        )
    for _, weight in pairs:
        if isinstance(weight, (str, list, tuple)) or callable(weight):
            raise errors.ArgumentTypeError(
                f"the weight of a loss must be a number, got {weight!r}",
                fix="pass (loss, weight), in this order",
            )
    parts = tuple((get(loss), weight) for loss, weight in pairs)

    def summed(y_true: Any, y_pred: Any) -> Any:
        trues, preds = jax.tree.leaves(y_true), jax.tree.leaves(y_pred)
        if not len(trues) == len(preds) == len(parts):
            raise errors.ShapeError(
                f"{len(parts)} losses for {len(preds)} predictions and {len(trues)} targets",
                fix="give one (loss, weight) for each leaf of prediction and target, in order",
            )
        values = []
        for (loss, _), true, pred in zip(parts, trues, preds, strict=True):
            value = jnp.asarray(loss.fn(true, pred))
            values.append(per_example(value, value.shape[0]) if value.ndim else value)
        if any(v.ndim == 0 for v in values):
            # One scalar makes the sum a scalar; broadcast to examples it would take weights it
            # cannot honour, while as a scalar `reduce` refuses them.
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


# --- shapes and dtypes ---------------------------------------------------------------------------


def _float_dtype() -> Any:
    return jnp.zeros(()).dtype


def _as_float(values: Any) -> jax.Array:
    array = jnp.asarray(values)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(_float_dtype())


def _pair(name: str, y_true: Any, y_pred: Any) -> tuple[jax.Array, jax.Array]:
    """Both as arrays of one shape and of the predictions' dtype."""
    y_pred, y_true = _as_float(y_pred), jnp.asarray(y_true)
    if y_true.shape != y_pred.shape:
        # (batch, 1) against (batch,) would broadcast to (batch, batch): a wrong number, silently.
        raise errors.ShapeError(
            f"{name}: y_true has shape {y_true.shape} and y_pred has shape {y_pred.shape}",
            fix="make them equal: squeeze a trailing axis of length 1 (y_pred[:, 0]) or add one "
            "(y_true[:, None])",
        )
    return y_true.astype(y_pred.dtype), y_pred


def _trailing_mean(values: jax.Array) -> jax.Array:
    return values if values.ndim <= 1 else jnp.mean(values, axis=tuple(range(1, values.ndim)))
