"""The arrays of a run on loan to a `State`.

    loan = Loan(step_state, accumulators)
    loan.read = True                        # a block must not donate these arrays

A loan also says in which form a `State` shows the step state.
"""

from __future__ import annotations

from typing import Any

from jaxloop._core.types import PyTree


class Loan:
    """The carried arrays of a run, lent to a `State`.

    The engine donates the arrays of a loan only if they were never read and no code holds the loan.
    Otherwise it copies them first. `read` records whether they were read. The engine checks for
    holders by whether this object is still alive.
    """

    __slots__ = ("__weakref__", "accumulators", "read", "step_state")

    def __init__(self, step_state: PyTree, accumulators: PyTree) -> None:
        self.step_state = step_state
        self.accumulators = accumulators
        self.read = False

    @property
    def shown(self) -> PyTree:
        """The step state as `State.step_state` shows it."""
        return self.step_state


class ShownLoan(Loan):
    """A loan whose step state is shown in another form."""

    __slots__ = ("_shown",)

    def __init__(self, loan: Loan, shown: Any) -> None:
        super().__init__(loan.step_state, loan.accumulators)
        self._shown = shown

    @property
    def shown(self) -> Any:
        return self._shown
