"""Connectionist temporal classification: the loss of a label sequence without its alignment.

    value = connectionist_temporal_classification((lengths, labels), log_probabilities)

Invariant: padding after the end of a label sequence may hold any number.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop.losses._labels import class_numbers, nan_unless
from jaxloop.losses._shapes import as_float


def connectionist_temporal_classification(
    y_true: Sequence[ArrayLike], y_pred: ArrayLike, *, blank: int = 0
) -> jax.Array:
    """Returns the negative log-likelihood of each target sequence over all alignments.

    Args:
        y_true: A pair ``(lengths (batch,), labels (batch, longest))`` of integers. A length that is
            not from 0 to ``longest``, or a label before the end that is not a class, gives NaN.
        y_pred: ``(batch, time, classes)``, log-probabilities or logits, which give the same value.
        blank: The class that means no label.

    Returns:
        ``(batch,)``.

    Source: `Axon.Losses.connectionist_temporal_classification`. `optax.ctc_loss` computes it.
    """
    # Imported here, so that `import jaxloop` does not import Optax.
    import optax

    if not isinstance(y_true, tuple | list) or len(y_true) != 2:
        raise errors.ShapeError(
            "connectionist_temporal_classification: y_true must be a pair (lengths, labels), got "
            f"{type(y_true).__name__}",
            fix="pass the number of labels of each sequence, then the padded labels",
        )
    y_pred = as_float(y_pred)
    lengths, labels = jnp.asarray(y_true[0]), jnp.asarray(y_true[1])
    if y_pred.ndim != 3 or lengths.shape != y_pred.shape[:1] or labels.shape[:1] != lengths.shape:
        raise errors.ShapeError(
            "connectionist_temporal_classification: the batch axes must be equal, got lengths "
            f"{lengths.shape}, labels {labels.shape} and y_pred {y_pred.shape}",
            fix="pass lengths (batch,), labels (batch, longest), y_pred (batch, time, classes)",
        )
    name = "connectionist_temporal_classification"
    labels, is_class = class_numbers(name, labels, y_pred.shape[-1])
    # A length counts labels, so it is one of longest + 1 numbers.
    lengths, valid = class_numbers(name, lengths, labels.shape[1] + 1)
    padding = jnp.arange(labels.shape[1], dtype=lengths.dtype)[None, :] >= lengths[:, None]
    valid &= jnp.all(is_class | padding, axis=1)
    no_padding = jnp.zeros(y_pred.shape[:2], y_pred.dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        value = optax.ctc_loss(
            y_pred, no_padding, labels, padding.astype(y_pred.dtype), blank_id=blank
        )
    return nan_unless(valid, jnp.asarray(value))
