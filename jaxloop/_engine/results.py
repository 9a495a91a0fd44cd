"""The result of a run: the output that a loop makes from a state, and a state from a checkpoint.

    output(loop, final_state(loop, data)) == run(loop, data)
    output(loop, restore(loop, "runs/a", "best", data=data))

An output can be made from any state of a loop, such as the one of `Terminated`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, Literal

from jaxloop._core.state import State, shown_as
from jaxloop._core.types import DataLike, OutputT, S
from jaxloop._engine.first_state import abstract_step_state
from jaxloop._engine.recovery import keep_state
from jaxloop._spec import LoopSpec
from jaxloop.errors import ArgumentTypeError


def output(loop: LoopSpec[S, OutputT], state: State[S]) -> OutputT:
    """Makes the output of the loop from a state, as `run` does from its final state.

    If the loop has ``early_stop(..., restore_best=True)``, the output is made from the best step
    state that ``state`` remembers.

    Args:
        loop: The loop.
        state: A state of this loop, such as one from `final_state`, `stream` or `jaxloop.restore`,
            or the one of `jaxloop.Terminated`.

    Returns:
        The result of the loop's output transform, or the state if there is none.

    Raises:
        ArgumentTypeError: ``state`` is not a `State`.

    Example:
        >>> import jaxloop as jl
        >>> loop = jl.loop(lambda b, s: s + b, output_transform=lambda state: int(state.step_state))
        >>> [loop.output(state) for state in loop.stream([1, 2], init_state=0, epochs=2)]
        [3, 6]
    """
    if not isinstance(state, State):
        raise ArgumentTypeError(
            f"output: state must be a jl.State, got {type(state).__name__}",
            fix="pass a State, such as the result of loop.final_state(data)",
        )
    made: OutputT = make_output(loop, state, None)
    return made


def shown(loop: LoopSpec[S, Any], state: State[S]) -> State[S]:
    """Returns a state whose ``step_state`` has the form in which the loop shows it."""
    if loop.show is None:
        return state
    state.loan.read = True  # the shown form may share the arrays
    return shown_as(state, loop.show)


def make_output(
    loop: LoopSpec[Any, Any], state: State[Any], transform: Callable[[State[Any]], Any] | None
) -> Any:
    """Returns the output of a run that ended with ``state``.

    Args:
        loop: The loop.
        state: The final state.
        transform: Makes the output in place of the loop's own transform.
    """
    transform = transform or loop.output_transform
    state = _best(loop, state)
    if transform is None:
        return state
    try:
        return transform(state)
    except BaseException as error:
        keep_state(error, state)
        raise


def _best(loop: LoopSpec[Any, Any], state: State[Any]) -> State[Any]:
    """Returns the state with the best step state, if the loop remembers one."""
    name = loop.best_from
    best = None if name is None else state.handler_state.get(name)
    if best is None:
        return state
    if "step_state" not in best:
        warnings.warn(
            f"{name}: the run that ended did not keep its best step state, because it had no "
            "restore_best=True, so the output is made from the last one",
            stacklevel=4,
        )
        return state
    return state if best["step_state"] is None else state.replace(step_state=best["step_state"])


def restore(
    loop: LoopSpec[S, Any],
    path: str | os.PathLike[str],
    which: Literal["latest", "best"] | int = "latest",
    *,
    data: DataLike = None,
    init_state: Any = None,
) -> State[S]:
    """Returns a `State` from a folder of checkpoints, with the structure of this loop's step state.

    Nothing is trained or compiled. The structure comes from the loop's init function, which is
    traced on the first batch of ``data``. Without an init function, it is that of ``init_state``.
    Without that, it is unknown: named tuples and classes become lists and dicts, as in
    `jaxloop.restore`.

    Args:
        loop: The loop that wrote the checkpoint, or one with the same step state. The metrics and
            handlers may differ.
        path: The path that was passed to `checkpoint`.
        which: "latest", "best" (by the criteria of the loop that wrote it), or a step.
        data: The data of the run, or a list of one batch. An iterator whose position can be saved
            is put back. None if the loop needs no batch to make its first step state.
        init_state: What was passed to `run`.

    Returns:
        A `State`. A damaged checkpoint is skipped with a warning.

    Raises:
        CheckpointError: No such checkpoint exists, and the error lists the ones that do. Or the
            folder cannot be read.
        SerializationError: It belongs to another model or optimizer. The error lists the leaves.
        ArgumentError: ``which`` is invalid.
        DataError: ``data`` is empty, or a one-shot iterator whose position cannot be saved.

    Example:
        >>> import tempfile, jaxloop as jl
        >>> path = tempfile.mkdtemp()
        >>> loop = jl.loop(lambda b, s: s + b, output_transform=lambda state: int(state.step_state))
        >>> loop.checkpoint(path).run([1, 2], init_state=0)
        3
        >>> loop.output(loop.restore(path, init_state=0))
        3
    """
    # Imported here, because most loops never read a checkpoint.
    from jaxloop._checkpoint import reader

    like = abstract_step_state(loop, data, init_state)
    return reader.restore(path, which, like=like)
