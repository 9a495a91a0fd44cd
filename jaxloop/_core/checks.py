"""Argument checks that several layers share.

    check_count("epochs", epochs, at_least=0)
    check_callable("loop", "step_fn", step_fn)

A check raises an error that names the argument and its value, or returns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxloop._core.types import Mode
from jaxloop.errors import ArgumentError, ArgumentTypeError, unknown_name


def check_count(name: str, value: object, *, at_least: int, where: str = "run") -> None:
    """Raises if ``value`` is not a whole number of at least ``at_least``.

    Raises:
        ArgumentTypeError: ``value`` is not a whole number.
        ArgumentError: ``value`` is too small.

    Example:
        >>> check_count("epochs", -1, at_least=0)
        Traceback (most recent call last):
        jaxloop.errors.ArgumentError: run: epochs must be at least 0, got -1...
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ArgumentTypeError(
            f"{where}: {name} must be a whole number, got {value!r}",
            fix=f"pass a whole number of at least {at_least}",
        )
    if value < at_least:
        raise ArgumentError(
            f"{where}: {name} must be at least {at_least}, got {value}",
            fix=f"pass a whole number of at least {at_least}",
        )


def check_callable(where: str, name: str, fn: object) -> None:
    """Raises if ``fn`` is not callable."""
    if not callable(fn):
        raise ArgumentTypeError(
            f"{where}: {name} must be a function, got {fn!r:.80}", fix=f"pass a function as {name}"
        )


def check_string(where: str, name: str, value: object, fix: str) -> None:
    """Raises if a value is not a string.

    Args:
        where: The function that was called.
        name: The argument.
        value: Its value.
        fix: What to do.

    Raises:
        ArgumentTypeError: It is not a string.
    """
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{where}: {name} must be a string, got {value!r}", fix=fix)


def check_mode(where: str, mode: Mode) -> None:
    """Raises if ``mode`` is not "auto", "min", "max" or a function of (new, best)."""
    if isinstance(mode, str):
        if mode not in ("auto", "min", "max"):
            raise unknown_name(f"mode of {where}", mode, ["auto", "min", "max"])
    elif not callable(mode):
        raise ArgumentTypeError(
            f"{where}: mode must be 'auto', 'min', 'max' or a function, got {mode!r}",
            fix="pass 'auto', 'min', 'max' or a function (new, best) -> bool",
        )


def as_number(value: object) -> float | None:
    """Returns a scalar value as a float, or None if it is not one real number.

    Example:
        >>> as_number(np.float32(0.5)), as_number({"a": 1.0}), as_number("1")
        (0.5, None, None)
    """
    if isinstance(value, str | bytes):
        return None
    try:
        array = np.asarray(value)
        return None if array.ndim or np.iscomplexobj(array) else float(array)
    except (TypeError, ValueError):  # a pytree, or a ragged list
        return None


def name_of(fn: Any) -> str:
    """Returns the name of a function or an object, for messages."""
    return getattr(fn, "__name__", None) or type(fn).__name__


def in_words(value: object) -> str:
    """Returns a value with its type, for messages.

    Example:
        >>> in_words(3)
        'an int (3)'
    """
    name = type(value).__name__
    article = "an" if name[0].lower() in "aeiou" else "a"
    return f"{article} {name} ({value!r:.80})"
