"""The options of a run.

    options = RunOptions.of(3, None, jit=True, fuse="auto", strict=False, debug=False)

Options are checked once, when they are made, and never change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxloop._core.checks import check_count
from jaxloop._core.types import Fuse, JitOptions
from jaxloop.errors import ArgumentError, ArgumentTypeError, unknown_name

_JIT_OPTIONS = ("compiler_options", "donate_argnums", "keep_unused", "inline")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RunOptions:
    """The options of `run`, `stream` and `check`.

    Attributes:
        epochs: The total number of epochs.
        iterations: The maximum number of iterations in an epoch, or None.
        jit: The options for `jax.jit`. If None, everything runs op by op.
        fuse: The maximum number of iterations in a block, or "auto".
        strict: Whether a recompilation during the run is an error.
        debug: Whether events, handlers and times are logged.
    """

    epochs: int
    iterations: int | None
    jit: dict[str, Any] | None
    fuse: Fuse
    strict: bool
    debug: bool

    @classmethod
    def of(
        cls,
        epochs: int,
        iterations: int | None,
        jit: JitOptions,
        fuse: Fuse,
        strict: bool,
        debug: bool,
    ) -> RunOptions:
        """Returns checked options.

        Raises:
            ArgumentError: A value is out of range or unknown.
            ArgumentTypeError: A value has the wrong type.
        """
        check_count("epochs", epochs, at_least=0)
        if iterations is not None:
            check_count("iterations", iterations, at_least=1)
        _check_fuse(fuse)
        # NumPy's integers pass the checks, and a checkpoint cannot keep them.
        most = None if iterations is None else int(iterations)
        return cls(int(epochs), most, _jit_options(jit), fuse, strict, debug)


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
