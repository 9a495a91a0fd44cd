"""Models of every kind, each turned into the same few functions.

    adapted = adapt(model)      # a Linen, NNX or Equinox module, a Model, a pair, a container

A framework is imported only where an object of it came in.
"""

from __future__ import annotations

import sys
from typing import Any

import jax

from jaxloop._supervised.models.adapted import Adapted, Model, PyTree, merge_state
from jaxloop.errors import ModelError

__all__ = ["Adapted", "Model", "adapt", "merge_state"]


def adapt(model: Any) -> Adapted:
    """The model as an `Adapted`.

    Raises:
        ModelError: It is none of the known kinds; the error names its type.

    Example:
        >>> adapted = adapt((lambda key, x: 2.0, lambda w, x: w * x))
        >>> adapted.apply(2.0, (), 3.0, train=True, key=None)[0]
        6.0
    """
    found = _adapt(model)
    if found is None:
        raise ModelError(
            f"a model cannot be made of a {type(model).__name__} ({model!r:.80})",
            fix="pass a Flax Linen, Flax NNX or Equinox module, a jl.Model(init, apply), a pair "
            "(init, apply), or a tuple, list or dict of models",
        )
    return found


def _adapt(model: Any) -> Adapted | None:
    from jaxloop._supervised.models import functions

    if isinstance(model, Model):
        return functions.adapt_model(model)
    # Whoever has an object of a framework has imported it.
    if "flax.linen" in sys.modules:
        from jaxloop._supervised.models import linen

        if linen.is_linen(model):
            return linen.adapt_linen(model)
    if "flax.nnx" in sys.modules:
        from jaxloop._supervised.models import nnx

        if nnx.is_nnx(model):
            return nnx.adapt_nnx(model)
    if "equinox" in sys.modules:
        from jaxloop._supervised.models import equinox

        if equinox.is_equinox(model):
            return equinox.adapt_equinox(model)
    if type(model).__name__ in ("Transformed", "TransformedWithState"):
        return functions.adapt_haiku(model)
    if isinstance(model, tuple | list | dict) and model:
        parts = model.values() if isinstance(model, dict) else model
        adapted = [_adapt(part) for part in parts]
        if all(one is not None for one in adapted):
            return _container(model, [one for one in adapted if one is not None])
        if isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
            return functions.adapt_pair(*model)
    return None


def _container(model: Any, parts: list[Adapted]) -> Adapted:
    """Several models on one input; states and predictions are containers like the model."""

    def like(values: list[Any]) -> Any:
        if isinstance(model, dict):
            return dict(zip(model, values, strict=True))
        return type(model)(values)

    def flat(container: Any) -> list[Any]:
        if container is None:
            return [None] * len(parts)
        if isinstance(model, dict):
            return [container.get(name) for name in model]
        return list(container)

    def split(state: PyTree) -> tuple[PyTree, PyTree]:
        pairs = [one.split(s) for one, s in zip(parts, flat(state), strict=True)]
        return like([p for p, _ in pairs]), like([r for _, r in pairs])

    def join(params: PyTree, rest: PyTree) -> PyTree:
        both = zip(parts, flat(params), flat(rest), strict=True)
        return like([one.join(p, r) for one, p, r in both])

    def init(key: jax.Array, x: PyTree) -> PyTree:
        keys = jax.random.split(key, len(parts))
        return like([one.init(k, x) for one, k in zip(parts, keys, strict=True)])

    def apply(
        params: PyTree, rest: PyTree, x: PyTree, *, train: bool, key: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        keys = [None] * len(parts) if key is None else list(jax.random.split(key, len(parts)))
        done = [
            one.apply(p, r, x, train=train, key=k)
            for one, p, r, k in zip(parts, flat(params), flat(rest), keys, strict=True)
        ]
        return like([y for y, _ in done]), like([r for _, r in done])

    def export(state: PyTree) -> Any:
        return like([one.export(s) for one, s in zip(parts, flat(state), strict=True)])

    def load(given: Any) -> PyTree:
        if given is None:
            return None
        return like([one.load(s) for one, s in zip(parts, flat(given), strict=True)])

    return Adapted(init, split, join, apply, export, load)
