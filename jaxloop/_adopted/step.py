"""A user's training or evaluation step, as the step of a loop.

    step = AdoptedStep(train_step, carried)
    emission = step(batch, step_state)

Each trace makes new modules from the carried variables, calls the user's function on them, and
splits them again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxloop._adopted.carried import Carried, has_modules, merged
from jaxloop._adopted.report import NOT_RETURNED, described, read_result, reported
from jaxloop._core.arrays import checked_state, copy, structure
from jaxloop._core.step_result import Emission
from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentTypeError, StructureError

_ON_THE_HOST = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


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
        with _explained("train_step"):
            result = _called(self.train_step, given, batch, *self.carried.key_of(step_state))
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
        with _explained("eval_step"):
            metrics = _called(self.eval_step, given, batch)
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


def _called(fn: Callable[..., Any], state: Any, *rest: Any) -> Any:
    """Calls a step as it is written: with the state as one argument, or with its modules."""
    if not (isinstance(state, tuple | list) and has_modules(state)):
        return fn(state, *rest)
    return fn(*state, *rest) if _takes_parts(fn, len(state), len(rest)) else fn(state, *rest)


def _takes_parts(fn: Callable[..., Any], num_parts: int, num_rest: int) -> bool:
    """Returns whether a function takes the modules of a state as separate arguments.

    Flax has two conventions for NNX, ``(model, optimizer, batch)`` and ``(state, batch)``, and only
    the signature tells which one a function follows. A wrong guess would raise an error that the
    user could not act on.
    """
    try:
        signature = inspect.signature(fn)
    except ValueError:  # a builtin has no signature
        return False
    binds = {}
    for count in (num_parts + num_rest, 1 + num_rest):
        try:
            signature.bind(*range(count))
            binds[count] = True
        except TypeError:
            binds[count] = False
    if all(binds.values()):  # the one without optional arguments
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = signature.parameters.values()
        required = [one for one in parameters if one.kind in kinds and one.default is one.empty]
        return len(required) != 1 + num_rest
    return binds[num_parts + num_rest]


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


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Adds a note to the error of a step that needs values on the host."""
    try:
        yield
    except _ON_THE_HOST as error:
        error.add_note(
            f"jaxloop: {name} is compiled, so it cannot use values on the host, as float(loss), "
            "`if loss > 1` and np.asarray(loss) do\n  fix: return the value as a metric and read "
            "it in a handler, as state.metrics[name] or state.outputs[name]; or pass jit=False"
        )
        raise
