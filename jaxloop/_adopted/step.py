"""A user's training or evaluation step, as the step of a loop.

    step = AdoptedStep(train_step, carried)
    emission = step(batch, step_state)

Each trace makes new modules from the carried variables, calls the user's function on them, and
splits them again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxloop._adopted.calling import call
from jaxloop._adopted.carried import Carried, merged
from jaxloop._adopted.detection import has_modules
from jaxloop._adopted.report import NOT_RETURNED, described, read_result, reported
from jaxloop._core.arrays import checked_state, copy, structure
from jaxloop._core.step_result import Emission
from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentTypeError, StructureError


@dataclasses.dataclass(frozen=True, eq=False)
class AdoptedStep:
    """A user's training step.

    Attributes:
        train_step: The user's function.
        carried: How the user's state is carried.
    """

    train_step: Callable[..., Any]
    carried: Carried

    @property
    def __name__(self) -> str:
        return getattr(self.train_step, "__name__", "train_step")

    def __call__(self, batch: PyTree, step_state: PyTree) -> Emission[PyTree]:
        """Returns the next step state, and what the step reports."""
        old = self.carried.state_of(step_state)
        given = merged(_own(old))
        rest = (batch, *self.carried.key_of(step_state))
        result = call("train_step", self.train_step, given, *rest)
        with_modules = has_modules(given)
        is_form = old.is_form_of if with_modules else functools.partial(_has_structure, old)
        new, metrics = read_result(result, is_form)
        if new is NOT_RETURNED and with_modules and not has_modules(result):
            new = given  # changed in place
        elif new is NOT_RETURNED:
            new = _candidate(given, result)  # a check below says what is wrong with it
        new = _checked(old.after(new) if with_modules else new, old)
        outputs = reported("train_step", metrics)
        return Emission(self.carried.advanced(step_state, new), outputs)


@dataclasses.dataclass(frozen=True, eq=False)
class AdoptedEvalStep:
    """A user's evaluation step, which gets the carried state after the batch.

    Attributes:
        eval_step: The user's function.
        carried: How the user's state is carried.
    """

    eval_step: Callable[..., Any]
    carried: Carried

    def __call__(self, batch: PyTree, step_state: PyTree) -> dict[str, PyTree]:
        """Returns what the step reports."""
        given = merged(_own(self.carried.state_of(step_state)))
        metrics = call("eval_step", self.eval_step, given, batch)
        if metrics is None:
            raise ArgumentTypeError(
                "eval_step must return metrics, got None",
                fix="return a dict, such as {'loss': loss}",
            )
        return reported("eval_step", metrics)


def _has_structure(state: PyTree, other: Any) -> bool:
    return bool(structure(other) == structure(state))


def _own(state: PyTree) -> PyTree:
    """Returns arrays that the user's function may donate."""
    leaves = jax.tree.leaves(state)
    return state if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) else copy(state)


def _checked(new: PyTree, old: PyTree) -> PyTree:
    try:
        return checked_state(new, old)
    except StructureError as error:
        raise StructureError(
            str(error).splitlines()[0],
            fix="return a state with the same structure, shapes and dtypes, and return everything "
            "else beside it: (state, {name: value})",
        ) from None


def _candidate(given: Any, result: Any) -> Any:
    """Returns what must be the state in a result in which nothing has the state's structure.

    Raises:
        ArgumentTypeError: There is no such part.
    """
    is_pair = isinstance(result, tuple | list) and len(result) == 2
    for part in [result[0], result] if is_pair else [result]:
        if type(part) is not type(given) or has_modules(part) != has_modules(given):
            continue
        if not isinstance(part, tuple | list) or len(part) == len(given):
            return part
    what = "the modules that it got" if has_modules(given) else "the state"
    raise ArgumentTypeError(
        f"train_step must return {what}, or a pair of it and metrics, got {described(result)}",
        fix="return state or (state, {'loss': loss}), with the state in its own structure",
    )
