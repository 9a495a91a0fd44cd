"""The transformations that a step may be under already.

    fn = unwrapped("train_step", nnx.jit(train_step))       # train_step

A block compiles the step anyway. `jax.jit` inside it costs nothing, because JAX inlines it.
"""

from __future__ import annotations

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
        ArgumentTypeError: The step is under `jax.pmap`.
    """
    # The function that `jax.pmap` returns has no type of its own, but its module is JAX's.
    if getattr(step, "__globals__", {}).get("__name__", "").startswith("jax._src.pmap"):
        raise ArgumentTypeError(
            f"from_train_step: {name} must not be under jax.pmap, got {step!r:.80}",
            fix="pass the function without jax.pmap, its replicated state and its axis_name",
        )
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return step
    compiled = type(nnx.jit(lambda: None))
    while hasattr(step, "__wrapped__"):
        # `nnx.jit(donate_argnums=0)(step)` is a function around what `nnx.jit(step)` is.
        inner = step.__wrapped__
        if not isinstance(step, compiled):
            if not isinstance(inner, compiled):
                break
            step = inner
            continue
        if _is_plain(step):
            step = inner
            continue
        break
    if type(step).__module__.startswith("flax.nnx.transforms"):
        warnings.warn(
            f"from_train_step: {name} runs under nnx.jit inside the compiled blocks, because it "
            "has static arguments or shardings; each compilation traces it twice\n"
            "  fix: pass the function without nnx.jit",
            stacklevel=3,
        )
    return step


def _is_plain(step: Any) -> bool:
    """Returns whether a step under `nnx.jit` has neither static arguments nor shardings."""
    options = ("static_argnums", "in_shardings", "out_shardings")
    return all(not getattr(step, option, None) for option in options)
