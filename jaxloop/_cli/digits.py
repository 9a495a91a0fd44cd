"""The model and the loop of the demo.

loop = make_loop(folder, jl.batches(validation, 128))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flax import linen as nn

import jaxloop as jl


class Network(nn.Module):
    """A small network with dropout."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Returns the logits, of shape ``(batch, 10)``, of images of shape ``(batch, 8, 8, 1)``."""
        x = x.reshape(x.shape[0], -1)
        for size in (256, 128):
            x = nn.relu(nn.Dense(size)(x))
            x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(10)(x)


def make_loop(out: Path, validation: Any) -> jl.Loop:
    """Returns a loop with validation, checkpoints, early stopping and a file of its metrics."""
    loss = "softmax_cross_entropy_with_integer_labels"
    return (
        jl.trainer(Network(), loss, "adam")
        .metric("accuracy")
        .validate(validation)
        .checkpoint(str(out / "checkpoints"), criteria="validation_accuracy", mode="max")
        .early_stop("validation_accuracy", mode="max", patience=8, restore_best=True)
        .write(jl.writers.csv(out / "metrics.csv"))
        .resume(str(out / "checkpoints"))
    )
