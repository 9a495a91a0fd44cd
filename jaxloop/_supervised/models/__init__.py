"""Models of every kind, each adapted to the same few functions.

    adapter = adapt(model)      # a Linen, NNX or Equinox module, a Model, a pair, a container ...

Invariant: a framework is imported only if the user has imported it. To add a kind of model, write a
module with ``accepts`` and ``adapt``, and add a line to ``_KINDS``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from jaxloop._core.types import PyTree
from jaxloop._supervised.models import container, pair
from jaxloop._supervised.models.adapter import ModelAdapter, merge_state
from jaxloop._supervised.models.explain import explained
from jaxloop._supervised.models.pair import Model
from jaxloop.errors import ModelError

__all__ = ["Model", "ModelAdapter", "ModelLike", "adapt", "merge_state"]


class InitAndApply(Protocol):
    """A model with the methods of a Flax Linen module or a transformed Haiku function."""

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the parameters."""

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the prediction."""


ModelLike: TypeAlias = (
    Model
    | InitAndApply
    | Callable[..., PyTree]
    | tuple["ModelLike", ...]
    | list[Any]
    | Mapping[str, Any]
)
"""A Linen, NNX or Equinox module, a Haiku function, a `Model`, a pair, or a container of models."""

_KINDS: tuple[tuple[str, str | None], ...] = (
    ("linen", "flax.linen"),
    ("nnx", "flax.nnx"),
    ("equinox", "equinox"),
    ("haiku", None),
)
"""The modules of this package for the frameworks, and the module that identifies each framework.

Each module is imported when it is needed, because it imports its framework. If you have a model of
a framework, you have imported it, so a framework that is not in `sys.modules` is not tried.
"""


def adapt(model: ModelLike | ModelAdapter) -> ModelAdapter:
    """Adapts a model of any kind. An adapter is returned unchanged.

    Raises:
        ModelError: The model is of an unknown kind. The message names its type.

    Example:
        >>> adapter = adapt((lambda key, x: 2.0, lambda w, x: w * x))
        >>> adapter.apply(2.0, (), 3.0, train=True, key=None)[0]
        6.0
    """
    found = model if isinstance(model, ModelAdapter) else _adapt(model)
    if found is None:
        raise ModelError(
            "a model must be a module of a known framework, two functions or a container of "
            f"models, got a {type(model).__name__} ({model!r:.80})",
            fix="pass a Flax Linen, Flax NNX or Equinox module, a jl.Model(init, apply), a pair "
            "(init, apply), or a tuple, list or dict of models",
        )
    return found


def _adapt(model: Any) -> ModelAdapter | None:
    if isinstance(model, Model):
        return explained(pair.adapt(model))
    for name, framework in _KINDS:
        if framework is None or framework in sys.modules:
            kind = importlib.import_module(f"{__name__}.{name}")
            if kind.accepts(model):
                return explained(kind.adapt(model))
    # A tuple of two models is a container. It is a pair only if its parts are plain functions.
    parts = [_adapt(part) for part in container.parts_of(model)]
    known = [part for part in parts if part is not None]
    if known and len(known) == len(parts):
        return container.adapt(model, known)
    return explained(pair.adapt(model)) if pair.accepts(model) else None
