"""A profile of some iterations, recorded with `jax.profiler`.

    loop = profile(loop, "runs/a/profile", iterations=(10, 20))

A profile that cannot be recorded never ends a run, and what is recorded changes no number.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import jax

from jaxloop._checkpoint.names import check_path
from jaxloop._core.checks import check_count
from jaxloop._core.dry import left_out
from jaxloop._core.events import Event
from jaxloop._core.filters import once, only
from jaxloop._core.state import State
from jaxloop._spec import Handler, HandlerFn, LoopSpec, RunStart, SpecT
from jaxloop.errors import ArgumentError, ArgumentTypeError, first_line

logger = logging.getLogger("jaxloop")


def profile(
    loop: SpecT,
    path: str | os.PathLike[str],
    *,
    iterations: tuple[int, int] = (10, 20),
    python: bool = False,
    name: str = "profile",
) -> SpecT:
    """Records a profile of some iterations with `jax.profiler`.

    The profile shows the kernels of the device and, as annotations, what the run does: "step" (a
    block is dispatched, with its epoch and iterations), "data", "wait for the device", "save", and
    each handler and observer by name. Blocks end where the profile begins and ends, and stay as
    long as they are in between. No number changes.

    To see it, use ``xprof --port 8791 PATH`` or TensorBoard, each with the package ``xprof``, or
    open the file ``*.trace.json.gz`` in https://ui.perfetto.dev.

    Args:
        loop: The loop.
        path: The folder, in which each profile gets a folder of its own.
        iterations: ``(first, stop)``: the iterations of the whole run, from 0, in which the profile
            begins and before which it ends. The first ones of a run compile. A run that resumes
            after ``first`` records nothing. A run that ends before ``stop`` ends the profile too.
        python: Whether Python's function calls are recorded as well. This makes the run slower and
            the file large.
        name: The name of the handler.

    Returns:
        A new loop with the profile.

    Raises:
        ArgumentError: ``iterations`` is empty, or the path is. Raised by `run`, before the first
            step, if the folder cannot be written.
        ArgumentTypeError: An argument has the wrong type.
    """
    folder = check_path("profile", path)
    first, stop = _checked(iterations)

    def check(_: LoopSpec[Any, Any]) -> None:
        _check_writable(Path(folder))

    def open_(start: RunStart) -> HandlerFn:
        if start.snapshot.step > first:
            logger.info(
                "%s: the run resumes after iteration %d, so nothing is recorded", name, first
            )
        return _Profile(folder, first, stop, python)

    # At the end of an iteration, so that the blocks of the profile are as long as any.
    events = [Event.ITERATION_COMPLETED] if first else [Event.STARTED, Event.ITERATION_COMPLETED]
    filter = (only(first) if first else once) | only(stop)
    handler = Handler(
        tuple(events),
        filter,
        name,
        _unopened,
        adds=(),
        check=check,
        open=open_,
        traces=True,
        in_dry_run=left_out,
    )
    return loop.attach(handler)


def _unopened(state: State[Any]) -> None:
    """Takes the place of the function that each run opens."""


def _checked(iterations: object) -> tuple[int, int]:
    if not isinstance(iterations, tuple | list) or len(iterations) != 2:
        raise ArgumentTypeError(
            f"profile: iterations must be a pair (first, stop), got {iterations!r}",
            fix="pass a pair such as (10, 20)",
        )
    first, stop = iterations
    check_count("the first of iterations", first, at_least=0, where="profile")
    check_count("the second of iterations", stop, at_least=1, where="profile")
    if first >= stop:
        raise ArgumentError(
            f"profile: iterations must not be empty, got {(first, stop)}",
            fix="pass a pair such as (10, 20)",
        )
    return int(first), int(stop)


def _check_writable(folder: Path) -> None:
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ArgumentError(
            f"profile: the path must be a folder that can be written, got {folder}, where {there} "
            + ("cannot be written" if there.is_dir() else "is not a folder"),
            fix="pass another path",
        )


class _Profile:
    """The profile of one run."""

    def __init__(self, folder: str, first: int, stop: int, python: bool) -> None:
        self._folder, self._first, self._stop = folder, first, stop
        self._python = python
        self._records = False

    def __call__(self, state: State[Any]) -> None:
        # `state.step_state` would mean a copy.
        if state.step == self._first and not self._records:
            jax.block_until_ready(state.loan.step_state)  # earlier blocks are not a part of it
            self._start()
        elif state.step == self._stop and self._records:
            jax.block_until_ready(state.loan.step_state)
            self.close()

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = int(self._python)
        try:
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self._folder, profiler_options=options)
        except Exception as error:
            _warn("begin", error)
        else:
            self._records = True

    def close(self) -> None:
        """Ends the profile, if it has begun, and writes it."""
        if not self._records:
            return
        self._records = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            _warn("be written", error)
        else:
            logger.info("the profile is in %s", self._folder)


def _warn(verb: str, error: Exception) -> None:
    warnings.warn(
        f"profile: the profile could not {verb}, and the run continues without it: "
        f"{type(error).__name__}: {first_line(error)}\n"
        "  fix: end any other profile first, and check that the folder can be written",
        stacklevel=2,
    )
