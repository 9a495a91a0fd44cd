"""Metrics of classes with the CLU protocol (clu, metrax), as accumulators that begin empty.

    keywords = model_output(cls, outputs, args, weight, "name")
    instance = from_output(cls, keywords)

Invariant: nothing of clu or metrax is imported; a class is asked what its ``from_model_output``
takes, since metrax's methods accept no other keyword.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxloop import errors

_TRUE_NAMES = ("y_true", "labels", "targets")
_PRED_NAMES = ("y_pred", "logits", "predictions")
_WEIGHT_NAMES = ("mask", "sample_weight", "sample_weights", "weights")


def model_output(
    cls: Any, outputs: Mapping[str, Any], args: tuple[Any, ...] | None, weight: Any, name: str
) -> dict[str, Any]:
    """The keywords that ``cls.from_model_output`` gets.

    Args:
        cls: The class.
        outputs: What the step reported.
        args: ``(y_true, y_pred)`` where fields were named, else None: taken from the outputs.
        weight: ``(batch,)`` or None.
        name: The metric's name, for messages.

    Returns:
        Keywords by name: outputs, then the other names of targets, predictions and weights.

    Raises:
        ArgumentError: A keyword is not there; the message lists those that are.
        ShapeError: There are weights, and the class takes none.
    """
    known = dict(outputs)
    known.pop("sample_weight", None)
    pair = args if args is not None else (outputs.get("y_true"), outputs.get("y_pred"))
    for position, names in ((0, _TRUE_NAMES), (1, _PRED_NAMES)):
        if len(pair) > position and pair[position] is not None:
            for alias in names:
                if args is not None or alias not in known:
                    known[alias] = pair[position]
    if weight is not None:
        known.update(dict.fromkeys(_WEIGHT_NAMES, weight))
    parameters = inspect.signature(cls.from_model_output).parameters.values()
    taken = {p.name for p in parameters}
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    missing = [p for p in required if p not in known]
    if missing:
        raise errors.ArgumentError(
            f"metric {name!r}: {cls.__name__}.from_model_output needs {', '.join(missing)}; there "
            f"are: {', '.join(sorted(known)) or 'none'}",
            fix="report it from the step with jl.emit",
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return known
    if weight is not None and not taken & set(_WEIGHT_NAMES):
        # Left out, the padding of a batch would count as examples.
        raise errors.ShapeError(
            f"metric {name!r}: there are sample weights (or a mask), and "
            f"{cls.__name__}.from_model_output takes none",
            fix="use a metric that takes a mask, or drop_remainder=True instead of pad=True",
        )
    return {key: value for key, value in known.items() if key in taken}


def from_output(cls: Any, keywords: dict[str, Any]) -> Any:
    """``cls.from_model_output(**keywords)``, its leaves arrays."""
    # Written for JAX's standard promotion; what it does inside is its own affair.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.tree.map(jnp.asarray, cls.from_model_output(**keywords))


def merge(a: Any, b: Any) -> Any:
    """``a.merge(b)``."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return a.merge(b)


def compute(instance: Any) -> Any:
    """``instance.compute()``."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return instance.compute()
