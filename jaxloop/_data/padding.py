"""The mask of a padded batch.

    marked((x, y), mask)                # (x, y, mask)
    marked((x, y, weight), mask)        # (x, y, weight * mask)
    marked({"x": x}, mask)              # {"x": x, "mask": mask}

Padding examples have a mask of False, so the loss and the metrics ignore them.
"""

from __future__ import annotations

from typing import Any

from jaxloop._core.types import PyTree


def marked(batch: PyTree, mask: Any) -> PyTree:
    """Returns a batch, or a stack of batches, with the mask that ``pad`` adds.

    Both may be NumPy or JAX arrays.
    """
    if isinstance(batch, dict):
        return {**batch, "mask": mask}
    if len(batch) == 2:
        return (*batch, mask)
    return (batch[0], batch[1], batch[2] * mask.astype(batch[2].dtype))
