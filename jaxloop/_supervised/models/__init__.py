"""Models of every kind, each adapted to the same few functions.

    adapter = adapt(model)      # a Linen, NNX or Equinox module, a Model, a pair, a container ...

Invariant: a framework is imported only if the user has imported it. To add a kind of model, write a
module with ``accepts`` and ``adapt``, and add a line to ``_KINDS``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from jaxloop._core.types import PyTree
from jaxloop._supervised.models import container, pair
from jaxloop._supervised.models.adapter import BoundModel, ModelAdapter, merge_state
from jaxloop._supervised.models.explain import explained
from jaxloop._supervised.models.pair import Model
from jaxloop.errors import ModelError

__all__ = ["BoundModel", "Model", "ModelAdapter", "ModelLike", "adapt", "merge_state"]


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


def adapt(model: ModelLike | ModelAdapter, rngs: Sequence[str] = ()) -> ModelAdapter:
    """Adapts a model of any kind. An adapter is returned unchanged.

    Args:
        model: The model.
        rngs: Names of random streams that a Linen module draws from. jaxloop finds them itself,
            unless the module asks whether a stream exists before it draws.

    Raises:
        ModelError: The model is of an unknown kind, and the message names its type. Or it has no
            random streams with names.

    Example:
        >>> adapter = adapt((lambda key, x: 2.0, lambda w, x: w * x))
        >>> adapter.bind(2.0, (), train=True, key=None).predict(3.0)
        6.0
    """
    found = model if isinstance(model, ModelAdapter) else _adapt(model, rngs)
    if found is None:
        raise ModelError(
            "a model must be a module of a known framework, two functions or a container of "
            f"models, got a {type(model).__name__} ({model!r:.80})",
            fix="pass a Flax Linen, Flax NNX or Equinox module, a jl.Model(init, apply), a pair "
            "(init, apply), or a tuple, list or dict of models",
        )
    return found


def _adapt(model: Any, rngs: Sequence[str]) -> ModelAdapter | None:
    if isinstance(model, Model):
        return _without_streams(pair.adapt(model), rngs)
    for name, framework in _KINDS:
        if framework is None or framework in sys.modules:
            kind = importlib.import_module(f"{__name__}.{name}")
            if kind.accepts(model):
                if name == "linen":
                    return explained(kind.adapt(model, rngs))
                return _without_streams(kind.adapt(model), rngs)
    # A tuple of two models is a container. It is a pair only if its parts are plain functions.
    parts = [_adapt(part, rngs) for part in container.parts_of(model)]
    known = [part for part in parts if part is not None]
    if known and len(known) == len(parts):
        return container.adapt(model, known)
    return _without_streams(pair.adapt(model), rngs) if pair.accepts(model) else None


def _without_streams(adapter: ModelAdapter, rngs: Sequence[str]) -> ModelAdapter:
    if rngs:
        raise ModelError(
            f"rngs= must be given with a Linen module, which draws from streams with names, got "
            f"rngs={tuple(rngs)!r} with another model",
            fix="leave out rngs=; an NNX module holds its streams, and other models get one key",
        )
    return explained(adapter)
