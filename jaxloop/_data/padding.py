"""The mask of a padded batch."""

from __future__ import annotations

from typing import Any

from jaxloop._core.types import PyTree


def marked(batch: PyTree, mask: Any) -> PyTree:
    """A batch, or a stack of them, with the mask that ``pad`` adds; both of NumPy or of JAX."""
    if isinstance(batch, dict):
        return {**batch, "mask": mask}
    if len(batch) == 2:
        return (*batch, mask)
    return (batch[0], batch[1], batch[2] * mask.astype(batch[2].dtype))
