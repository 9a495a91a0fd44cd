"""Optax's dice losses over a whole data set, from sums over its examples.

    sums = sums_of("multiclass_generalized_dice_loss", {"smooth": 0.5})

The generalized dice loss weights the classes by their frequencies in a batch, and `dice_loss` with
``axis`` over the batch divides sums over a batch. Neither is a mean over examples. Invariant: the
value from the sums is that of one batch that holds all examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop._core.types import PyTree
from jaxloop.losses._loss import Sums
from jaxloop.losses._shapes import same_shape


def sums_of(name: str, keywords: Mapping[str, Any]) -> Sums | None:
    """Returns the sums of a dice loss that is not a mean over examples, or None.

    Args:
        name: The name of Optax's function.
        keywords: The keywords of the call.
    """
    if name == "multiclass_generalized_dice_loss":
        return _generalized(keywords)
    axis = keywords.get("axis")
    if name == "dice_loss" and axis is not None and 0 in (axis if _is_several(axis) else (axis,)):
        return _over_the_batch(keywords)
    return None


def _generalized(keywords: Mapping[str, Any]) -> Sums:
    def terms(y_true: ArrayLike, y_pred: ArrayLike) -> PyTree:
        # Imported here, so that `import jaxloop` does not import Optax.
        import optax

        targets, predictions = same_shape("multiclass_generalized_dice_loss", y_true, y_pred)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            dice = optax.losses.dice_loss(predictions, targets, reduction="none", **keywords)
        frequency = jnp.sum(targets, axis=tuple(range(1, targets.ndim - 1)))
        return {"dice": dice, "frequency": frequency}

    def finish(sums: PyTree, total: jax.Array) -> jax.Array:
        # As in Optax, where the background loses its dice but keeps its part of the weights.
        weights = 1 / (jnp.square(sums["frequency"]) + 1e-7)
        weights = weights / jnp.sum(weights) * weights.shape[0]
        dice = sums["dice"]
        return jnp.mean(weights[weights.shape[0] - dice.shape[0] :] * dice) / total

    return Sums(terms, finish)


def _over_the_batch(keywords: Mapping[str, Any]) -> Sums:
    options = {"smooth": 1.0, "alpha": 0.5, "beta": 0.5, "reduction": "mean", **keywords}
    over = keywords["axis"] if _is_several(keywords["axis"]) else (keywords["axis"],)

    def terms(y_true: ArrayLike, y_pred: ArrayLike) -> PyTree:
        targets, predictions = same_shape("dice_loss", y_true, y_pred)
        if options.get("apply_softmax", True):
            binary = predictions.shape[-1] == 1
            predictions = (jax.nn.sigmoid if binary else jax.nn.softmax)(predictions)
        # The sum over the batch comes later. The axes after it keep their places until then.
        within = tuple(axis for axis in over if axis != 0)
        return {
            "both": jnp.sum(predictions * targets, axis=within),
            "predicted": jnp.sum(predictions, axis=within),
            "true": jnp.sum(targets, axis=within),
        }

    def finish(sums: PyTree, total: jax.Array) -> jax.Array:
        both = sums["both"]
        whole = (
            both
            + options["alpha"] * (sums["predicted"] - both)
            + options["beta"] * (sums["true"] - both)
        )
        dice = 1 - (both + options["smooth"]) / (whole + options["smooth"])
        if options.get("class_weights") is not None:
            dice = dice * options["class_weights"]
        if options.get("ignore_background", False) and dice.shape[-1] > 1:
            dice = dice[..., 1:]
        reduce = {"mean": jnp.mean, "sum": jnp.sum}.get(options["reduction"])
        return dice if reduce is None else reduce(dice, axis=-1)

    return Sums(terms, finish)


def _is_several(axis: object) -> bool:
    return isinstance(axis, tuple | list)
