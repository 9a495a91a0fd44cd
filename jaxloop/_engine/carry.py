"""The arrays that a run carries from block to block: the step state and the accumulators.

    carry = Carry(donates=True)
    carry.set(step_state, accumulators)
    loan = carry.lend()                     # for a `State` that a handler gets
    ...                                     # the handler runs
    carry.reclaim()                         # copied if the loan was read or is kept

A block donates the carry, which destroys its arrays. The engine therefore first copies the arrays
if other code may still read them. If a handler does not read ``state.step_state``, nothing is
copied.
"""

from __future__ import annotations

import weakref

import numpy as np

from jaxloop._core.arrays import copy, copy_later, put
from jaxloop._core.loan import Loan
from jaxloop._core.types import PyTree

Values = tuple[PyTree, PyTree]
"""A step state and accumulators."""


class Carry:
    """The step state and the accumulators, and whether they are on loan.

    Args:
        donates: Whether blocks donate them.

    Attributes:
        values: ``(step state, accumulators)``.
    """

    def __init__(self, *, donates: bool) -> None:
        self.values: Values = ({}, {})
        self._donates = donates
        self._loan: Loan | None = None

    @property
    def step_state(self) -> PyTree:
        """The step state. Reading it here does not count as a loan."""
        return self.values[0]

    def set(self, step_state: PyTree, accumulators: PyTree) -> None:
        """Replaces both by arrays that no other code holds."""
        self.values = (step_state, accumulators)
        self._loan = None

    def set_copy(self, step_state: PyTree, accumulators: PyTree) -> None:
        """Replaces both by copies, because other code may hold the arrays."""
        self.set(*copy((step_state, accumulators)))

    def set_accumulators(self, accumulators: PyTree) -> None:
        """Replaces the accumulators by arrays that no other code holds."""
        self.reclaim()
        self.values = (self.values[0], accumulators)

    def lend(self) -> Loan:
        """Returns the arrays as a loan, the same one until it is reclaimed.

        Fresh accumulators may be on the host until a block or a loan needs them.
        """
        if self._loan is None:
            packed = self.values[1]
            if packed and type(packed[0]) is np.ndarray:
                self.values = (self.values[0], put(packed))
            self._loan = Loan(*self.values)
        return self._loan

    def reclaim(self) -> None:
        """Takes the loan back, so that the next block may donate the arrays.

        The arrays are copied if they were read or may be read later. A `State` that a handler
        keeps, or that a thread is saving, keeps the loan alive.
        """
        loan, self._loan = self._loan, None
        if loan is None:
            return
        kept = loan.read
        if not kept:
            alive = weakref.ref(loan)
            del loan
            kept = alive() is not None
        if kept and self._donates:
            self.values = copy_later(self.values)
