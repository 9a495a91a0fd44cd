"""Checks of arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxloop.errors import ArgumentError, ArgumentTypeError, unknown_name

JIT_OPTIONS = ("compiler_options", "donate_argnums", "keep_unused", "inline")


def check_fuse(fuse: object) -> None:
    """Raises unless ``fuse`` is "auto" or a whole number from 1."""
    if isinstance(fuse, str):
        if fuse != "auto":
            raise unknown_name("fuse", fuse, ["auto"])
    elif isinstance(fuse, bool) or not isinstance(fuse, int):
        raise ArgumentTypeError(f"run: fuse must be 'auto' or a whole number, and is {fuse!r}")
    elif fuse < 1:
        raise ArgumentError(f"run: fuse must be at least 1, and is {fuse}")


def jit_options(jit: object) -> dict[str, Any] | None:
    """The options for `jax.jit` that ``jit`` means; None: run op by op."""
    if isinstance(jit, bool):
        return {} if jit else None
    if not isinstance(jit, Mapping):
        raise ArgumentTypeError(f"run: jit must be True, False or a dict of options, not {jit!r}")
    for name in jit:
        if name not in JIT_OPTIONS:
            raise unknown_name("option of jit", name, JIT_OPTIONS)
    return dict(jit)


def check_count(name: str, value: object, *, at_least: int, where: str = "run") -> None:
    """Raises unless ``value`` is a whole number of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ArgumentTypeError(f"{where}: {name} must be a whole number, and is {value!r}")
    if value < at_least:
        raise ArgumentError(f"{where}: {name} must be at least {at_least}, and is {value}")


def name_of(fn: Any) -> str:
    return getattr(fn, "__name__", None) or type(fn).__name__


def check_callable(where: str, what: str, fn: Any) -> Any:
    if not callable(fn):
        raise ArgumentTypeError(f"{where}: {what} must be a function, and is {fn!r:.80}")
    return fn
