"""The transformations that a step may be under already.

    fn = unwrapped("train_step", nnx.jit(train_step))       # train_step

A block compiles the step anyway. `jax.jit` inside it costs nothing, because JAX inlines it.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

from jaxloop.errors import ArgumentTypeError


def unwrapped(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a step without `nnx.jit`, where that changes nothing.

    Args:
        name: What the step is, for messages.
        step: The user's step.

    Raises:
        ArgumentTypeError: The step is under `jax.pmap`, or holds its own modules.
    """
    # The functions that these two return have no type of their own, only a module.
    module = getattr(step, "__globals__", {}).get("__name__", "")
    if module.startswith("jax._src.pmap"):
        raise ArgumentTypeError(
            f"from_train_step: {name} must not be under jax.pmap, got {step!r:.80}",
            fix="pass the function without jax.pmap, its replicated state and its axis_name",
        )
    if module.startswith("flax.nnx.graph"):
        raise ArgumentTypeError(
            f"from_train_step: {name} must get its modules as arguments, got nnx.cached_partial, "
            "which holds them",
            fix="pass the function itself, and the modules as the state: "
            "loop.run(data, (model, optimizer))",
        )
    if _is_under_nnx_jit(step) and _is_plain(step):
        return step.__wrapped__  # type: ignore[attr-defined]  # of nnx.jit
    inner = step.func if isinstance(step, functools.partial) else step
    if _is_under_nnx_jit(inner):
        warnings.warn(
            f"from_train_step: {name} stays under nnx.jit inside the compiled blocks, because it "
            "has static or bound arguments, shardings or other options; each compilation traces it "
            "through nnx.jit, which takes longer\n  fix: pass the function without nnx.jit",
            stacklevel=3,
        )
    return step


def _is_under_nnx_jit(step: Any) -> bool:
    return "flax.nnx" in sys.modules and type(step).__module__.startswith("flax.nnx.transforms")


def _is_plain(step: Any) -> bool:
    """Returns whether a step under `nnx.jit` has neither static arguments nor shardings."""
    options = ("static_argnums", "in_shardings", "out_shardings")
    return type(step).__name__ == "JitWrapped" and not any(
        getattr(step, option, None) for option in options
    )
