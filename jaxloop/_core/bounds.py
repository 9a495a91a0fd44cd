"""The bounds of a run: its epochs, the iterations of each epoch, and its steps.

    bounds = Bounds(epochs=None, iterations=100, steps=250)
    bounds.has_epoch(2, 200)                # another epoch begins after 200 steps
    bounds.of_epoch(200)                    # and has at most 50 iterations

Epochs and steps are totals, which include those before a resume.
"""

from __future__ import annotations

from typing import NamedTuple


class Bounds(NamedTuple):
    """The bounds of a run. None is no bound.

    Attributes:
        epochs: The total number of epochs.
        iterations: The maximum number of iterations in an epoch.
        steps: The total number of steps.
    """

    epochs: int | None
    iterations: int | None
    steps: int | None

    @property
    def is_empty(self) -> bool:
        """Whether no event fires at all."""
        return self.epochs == 0 or self.steps == 0

    @property
    def needs_batches(self) -> bool:
        """Whether data that end in the middle of an epoch end too early.

        If only the number of steps is given, an iterator must have a batch for each step.
        """
        return self.iterations is not None or self.epochs is None

    def has_epoch(self, epoch: int, step: int) -> bool:
        """Returns whether an epoch may begin after ``step`` steps.

        Example:
            >>> Bounds(None, None, 250).has_epoch(2, 200), Bounds(2, None, 250).has_epoch(2, 200)
            (True, False)
        """
        return is_within(epoch, self.epochs) and is_within(step, self.steps)

    def of_epoch(self, step: int) -> int | None:
        """Returns how many iterations an epoch may have that begins after ``step`` steps.

        Example:
            >>> Bounds(None, 100, 250).of_epoch(200), Bounds(3, None, None).of_epoch(200)
            (50, None)
        """
        if self.steps is None:
            return self.iterations
        return limited(self.steps - step, self.iterations)


def is_within(count: int, bound: int | None) -> bool:
    """Returns whether a count has not reached its bound."""
    return bound is None or count < bound


def limited(count: int, bound: int | None) -> int:
    """Returns a count, or its bound if that is less."""
    return count if bound is None else min(count, bound)


def is_wider(new: int | None, old: int | None) -> bool:
    """Returns whether a new bound allows more than an old one.

    Example:
        >>> is_wider(3, 2), is_wider(None, 2), is_wider(3, None)
        (True, True, False)
    """
    return old is not None and (new is None or new > old)
