"""The call of a user's step as it is written, and notes on the errors that tracing it causes.

    result = call("train_step", train_step, (model, optimizer), batch)

A step takes its state as one argument, ``(state, batch)``. A step of NNX modules may take each of
them as an argument, ``(model, optimizer, batch)``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxloop._adopted.detection import has_modules
from jaxloop.errors import ArgumentTypeError

_ON_THE_HOST = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def call(name: str, fn: Callable[..., Any], state: Any, *rest: Any) -> Any:
    """Calls a step with its state, the batch and, if it gets one, a key.

    Args:
        name: What the step is, for messages.
        fn: The user's function.
        state: The state, which may be a tuple or list of NNX modules.
        rest: The other arguments.

    Raises:
        ArgumentTypeError: The function does not take these arguments.
    """
    ways = [(state, *rest)]
    if isinstance(state, tuple | list) and has_modules(state):
        ways.append((*state, *rest))
    arguments = _fitting(name, fn, ways)
    with _explained(name):
        return fn(*arguments)


def _fitting(name: str, fn: Callable[..., Any], ways: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Returns the arguments that a function takes.

    Flax has two conventions for NNX, and only the signature tells which one a function follows. A
    wrong guess would raise an error that the user could not act on.
    """
    try:
        signature = inspect.signature(fn)
    except ValueError:  # a builtin has no signature
        return ways[0]
    fitting = [one for one in ways if _binds(signature, one)]
    if not fitting:
        shown = " or ".join(
            f"{len(one)} ({'state' if i == 0 else 'each module'}, batch{', key' * (num > 1)})"
            for i, (one, num) in enumerate((one, len(ways[0]) - 1) for one in ways)
        )
        raise ArgumentTypeError(
            f"{name} must take {shown} arguments, got the signature {signature}",
            fix=f"pass a function such as {name}(state, batch), with the key last if there is one",
        )
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = signature.parameters.values()
    required = [one for one in parameters if one.kind in kinds and one.default is one.empty]
    # If both ways fit, an optional argument or ``*args`` takes what is left over.
    exact = [one for one in fitting if len(one) == len(required)]
    return (exact or fitting)[-1]


def _binds(signature: inspect.Signature, arguments: tuple[Any, ...]) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Adds a note to an error that has its cause in how a loop runs the step."""
    try:
        yield
    except _ON_THE_HOST as error:
        error.add_note(
            f"jaxloop: {name} is traced, also with jit=False, so it cannot use values on the host, "
            "as float(loss), `if loss > 1` and np.asarray(loss) do\n  fix: return the value as a "
            "metric and read it in a handler, as state.metrics[name] or state.outputs[name]"
        )
        raise
    except Exception as error:
        if type(error).__name__ == "TraceContextError":  # of Flax, which may not be imported
            error.add_note(
                f"jaxloop: {name} changes an NNX module that is not in its state\n  fix: pass the "
                "module as a part of the state: loop.run(data, (model, optimizer, other))"
            )
        raise
