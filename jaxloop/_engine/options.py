"""The options of a run.

    options = RunOptions.of({"epochs": 3, "fuse": 1})

    @takes_run_arguments                    # `help` shows the arguments and their defaults
    def run(loop, data, **arguments: Unpack[RunArguments]): ...

Options are checked once, when they are made, and never change. The arguments of `run`, `stream` and
the others are declared once, here.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, TypeVar

from jaxloop._core.bounds import Bounds
from jaxloop._core.checks import as_number, check_count, in_words
from jaxloop._core.types import Fuse, JitOptions
from jaxloop.errors import ArgumentError, ArgumentTypeError, first_line, unknown_name

_JIT_OPTIONS = ("compiler_options", "donate_argnums", "keep_unused", "inline")


class RunArguments(TypedDict, total=False):
    """The keyword arguments of `run`, which other methods of a loop take too."""

    epochs: int | None
    iterations: int | None
    steps: int | None
    max_time: float | None
    jit: JitOptions
    fuse: Fuse
    strict: bool
    debug: bool


_DEFAULTS: RunArguments = {
    "epochs": None,
    "iterations": None,
    "steps": None,
    "max_time": None,
    "jit": True,
    "fuse": "auto",
    "strict": False,
    "debug": False,
}

_Fn = TypeVar("_Fn", bound=Callable[..., Any])


def takes_run_arguments(fn: _Fn) -> _Fn:
    """Makes `help` show the arguments of a run in place of ``**arguments``."""
    signature = inspect.signature(fn)
    hints = RunArguments.__annotations__
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=getattr(hints[name], "__forward_arg__", hints[name]),
        )
        for name, default in _DEFAULTS.items()
    ]
    own = list(signature.parameters.values())
    after = [one for one in own if one.kind is one.KEYWORD_ONLY and one.default is not one.empty]
    before = [one for one in own if one.kind is not one.VAR_KEYWORD and one not in after]
    signature = signature.replace(parameters=[*before, *shared, *after])
    fn.__signature__ = signature  # type: ignore[attr-defined]  # `inspect` reads it
    return fn


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RunOptions:
    """The options of a run.

    Attributes:
        bounds: How far it goes.
        max_time_s: The seconds after which it ends, or None.
        jit: The options for `jax.jit`. If None, everything runs op by op.
        fuse: The maximum number of iterations in a block, or "auto".
        strict: Whether a recompilation during the run is an error.
        debug: Whether events, handlers and times are logged.
    """

    bounds: Bounds
    max_time_s: float | None
    jit: dict[str, Any] | None
    fuse: Fuse
    strict: bool
    debug: bool

    @classmethod
    def of(cls, arguments: RunArguments) -> RunOptions:
        """Returns checked options, with defaults for missing arguments.

        Raises:
            ArgumentError: A value is out of range or unknown.
            ArgumentTypeError: A value has the wrong type, or an argument is unknown.
        """
        for name in arguments:
            if name not in _DEFAULTS:
                known = first_line(unknown_name("argument", name, _DEFAULTS))
                raise ArgumentTypeError(
                    f"run: {known}", fix=f"use one of: {', '.join(sorted(_DEFAULTS))}"
                )
        given: RunArguments = {**_DEFAULTS, **arguments}
        _check_fuse(given["fuse"])
        epochs = _count("epochs", given["epochs"], 0)
        iterations = _count("iterations", given["iterations"], 1)
        steps = _count("steps", given["steps"], 0)
        bounds = Bounds(1 if epochs is None and steps is None else epochs, iterations, steps)
        jit = _jit_options(given["jit"])
        max_time_s = _seconds(given["max_time"])
        return cls(bounds, max_time_s, jit, given["fuse"], given["strict"], given["debug"])


def _count(name: str, value: int | None, at_least: int) -> int | None:
    """Returns a checked bound."""
    if value is None:
        return None
    check_count(name, value, at_least=at_least)
    return int(value)  # NumPy's integers pass the check, and a checkpoint cannot keep them


def _seconds(value: object) -> float | None:
    """Returns a checked time."""
    if value is None:
        return None
    number = as_number(value)
    if isinstance(value, bool) or number is None:
        raise ArgumentTypeError(
            f"run: max_time must be a number of seconds, got {in_words(value)}",
            fix="pass seconds, such as max_time=3600",
        )
    if not number > 0:
        raise ArgumentError(
            f"run: max_time must be more than 0 seconds, got {number}",
            fix="pass seconds, such as max_time=3600, or None for no limit",
        )
    return number


def _check_fuse(fuse: object) -> None:
    if isinstance(fuse, str):
        if fuse != "auto":
            raise unknown_name("fuse", fuse, ["auto"])
    elif isinstance(fuse, bool) or not isinstance(fuse, int):
        raise ArgumentTypeError(
            f"run: fuse must be 'auto' or a whole number, got {fuse!r}",
            fix="pass 'auto', or the maximum number of iterations in a block",
        )
    elif fuse < 1:
        raise ArgumentError(
            f"run: fuse must be at least 1, got {fuse}", fix="pass 'auto', or 1 to fuse nothing"
        )


def _jit_options(jit: object) -> dict[str, Any] | None:
    if isinstance(jit, bool):
        return {} if jit else None
    if not isinstance(jit, Mapping):
        raise ArgumentTypeError(
            f"run: jit must be True, False or a dict of options, got {jit!r}",
            fix="pass False to run op by op, or a dict of options for jax.jit",
        )
    for name in jit:
        if name not in _JIT_OPTIONS:
            raise unknown_name("option of jit", name, _JIT_OPTIONS)
    return dict(jit)
