"""What a step returns: its new state and what it reports.

    state, outputs = read_result(result, is_state=lambda x: ...)
    outputs = reported("train_step", {"loss": loss})

Invariant: what has the structure of the state is the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp

from jaxloop._core.checks import in_words
from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentTypeError

NOT_RETURNED: Final = object()
"""The state of a step that changes its modules in place."""


def read_result(result: Any, is_state: Callable[[Any], bool]) -> tuple[Any, Any]:
    """Returns the state and the metrics in the result of a step, or `NOT_RETURNED` and the result.

    Args:
        result: ``state``, or a pair ``(state, metrics)``.
        is_state: Returns whether a value is the state.
    """
    if is_state(result):
        return result, None
    if isinstance(result, tuple | list) and len(result) == 2 and is_state(result[0]):
        return result[0], result[1]
    return NOT_RETURNED, result


def reported(name: str, metrics: Any) -> dict[str, PyTree]:
    """Returns what a step reports, by name.

    Args:
        name: The name of the step, for an error message.
        metrics: A mapping, a named tuple, a dataclass, a scalar, or None.

    Raises:
        ArgumentTypeError: It is something else.

    Example:
        >>> reported("train_step", 0.5)
        {'loss': 0.5}
    """
    named = _by_name(metrics)
    if named is not None:
        for value, leaf in ((key, one) for key in named for one in jax.tree.leaves(named[key])):
            if not (isinstance(leaf, bool | int | float | complex) or hasattr(leaf, "dtype")):
                raise ArgumentTypeError(
                    f"{name} must report arrays and numbers, got {in_words(leaf)} in {value!r}",
                    fix="report numbers, and keep everything else out of the compiled step",
                )
        return named
    raise ArgumentTypeError(
        f"{name} must report metrics as a dict, a named tuple or a dataclass, or a scalar loss, "
        f"got {described(metrics)}",
        fix="return a dict, such as {'loss': loss, 'logits': logits}",
    )


def _by_name(metrics: Any) -> dict[str, PyTree] | None:
    if metrics is None:
        return {}
    if isinstance(metrics, Mapping):
        return {str(key): value for key, value in metrics.items()}
    if isinstance(metrics, tuple) and hasattr(metrics, "_fields"):
        return dict(zip(metrics._fields, metrics, strict=True))
    if dataclasses.is_dataclass(metrics) and not isinstance(metrics, type):
        return {one.name: getattr(metrics, one.name) for one in dataclasses.fields(metrics)}
    return {"loss": metrics} if _is_scalar(metrics) else None


def described(value: Any) -> str:
    """Describes what a step returned."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype}{list(value.shape)}"
    if isinstance(value, tuple | list):
        parts = ", ".join(described(one) for one in value)
        return f"a {type(value).__name__} of {len(value)} ({parts})"
    return in_words(value) if value is None or jax.tree_util.all_leaves([value]) else _kind(value)


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _is_scalar(value: Any) -> bool:
    return jax.tree_util.all_leaves([value]) and (
        isinstance(value, bool | int | float)
        or (hasattr(value, "dtype") and jnp.shape(value) == ())
    )
