"""The signatures of the batches of a run. Each one needs a compilation of the step.

signatures = Signatures()
signatures.add(known, new)              # warns if there are many
"""

from __future__ import annotations

import warnings

from jaxloop._core.batch import Signature, signature_change

SAME_SHAPES = "use batches of one shape: jl.batches(..., pad=True) or drop_remainder=True"
"""How to avoid batches of several signatures."""
_BEFORE_WARNING = 3


class Signatures:
    """The signatures so far. Two are usual, because the last batch is often smaller."""

    def __init__(self) -> None:
        self._seen: set[Signature] = set()
        self._warned = False

    def add(self, known: Signature, new: Signature) -> None:
        """Adds the signature of a batch that differs from that of the first batch."""
        self._seen |= {known, new}
        if len(self._seen) >= _BEFORE_WARNING and not self._warned:
            self._warned = True
            change = signature_change(known, new)
            message = f"the shapes of the batches keep changing: {change}\n  fix: {SAME_SHAPES}"
            warnings.warn(message, stacklevel=2)
