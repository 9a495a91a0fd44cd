"""Losses: per-example functions of ``(y_true, y_pred)``, and one way to look up any loss.

    loss = losses.get("mean_squared_error")          # or optax.l2_loss, or [(loss, weight), ...]
    value = losses.average(loss, y_true, y_pred, sample_weight, num_examples)

Invariant: a loss of this package returns one value per example, ``(batch,)``, in float32 or wider,
and never broadcasts targets against predictions.
"""

from __future__ import annotations

from jaxloop.losses._averages import average, per_example, reduce
from jaxloop.losses._ctc import connectionist_temporal_classification
from jaxloop.losses._functions import (
    binary_cross_entropy,
    categorical_cross_entropy,
    categorical_hinge,
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
from jaxloop.losses._lookup import LossLike, get, names
from jaxloop.losses._loss import Labels as Labels
from jaxloop.losses._loss import Loss, LossFn
from jaxloop.losses._loss import Sums as Sums
from jaxloop.losses._objective import Objective as Objective
from jaxloop.losses._objective import objective as objective
from jaxloop.losses._optax import is_optax_loss as is_optax_loss
from jaxloop.losses._optax import target_first as target_first
from jaxloop.losses._shapes import flattened as flattened
from jaxloop.losses._shapes import widened as widened

__all__ = [
    "Loss",
    "LossFn",
    "LossLike",
    "average",
    "binary_cross_entropy",
    "categorical_cross_entropy",
    "categorical_hinge",
    "connectionist_temporal_classification",
    "cosine_similarity",
    "get",
    "hinge",
    "huber",
    "kl_divergence",
    "log_cosh",
    "margin_ranking",
    "mean_absolute_error",
    "mean_squared_error",
    "names",
    "per_example",
    "poisson",
    "reduce",
    "soft_margin",
]
