"""Several models on one input, in a tuple, list or dict, as are their states and predictions.

    adapter = adapt({"a": model_a, "b": model_b}, [adapter_a, adapter_b])

Invariant: the models are independent. Each has its own part of the state and its own random key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import ModelAdapter


def parts_of(model: Any) -> list[Any]:
    """Returns the models in a tuple, list or dict. Other models have no parts."""
    if isinstance(model, dict):
        return list(model.values())
    return list(model) if isinstance(model, tuple | list) else []


def adapt(model: Any, parts: Sequence[ModelAdapter]) -> ModelAdapter:
    """Adapts a container of models, given the adapter of each."""
    container = _Container(model, parts)
    return ModelAdapter(
        container.init,
        container.split,
        container.join,
        container.apply,
        container.export,
        container.load,
        holds_state=all(part.holds_state for part in parts),
        statics=container.statics,
    )


@dataclasses.dataclass(frozen=True)
class _Container:
    """The functions of a `ModelAdapter`, each of which calls those of the parts."""

    model: Any
    parts: Sequence[ModelAdapter]

    def _pack(self, values: list[PyTree]) -> PyTree:
        """Returns one value per part as a container like the model."""
        if isinstance(self.model, dict):
            return dict(zip(self.model, values, strict=True))
        return type(self.model)(values)

    def _unpack(self, container: PyTree) -> list[PyTree]:
        """Returns the value of each part. None, or a name that a dict lacks, gives None."""
        if container is None:
            return [None] * len(self.parts)
        if isinstance(self.model, dict):
            return [container.get(name) for name in self.model]
        return list(container)

    def init(self, key: jax.Array, x: PyTree) -> PyTree:
        keys = jax.random.split(key, len(self.parts))
        return self._pack([part.init(k, x) for part, k in zip(self.parts, keys, strict=True)])

    def split(self, state: PyTree) -> tuple[PyTree, PyTree]:
        pairs = [part.split(s) for part, s in zip(self.parts, self._unpack(state), strict=True)]
        return self._pack([p for p, _ in pairs]), self._pack([r for _, r in pairs])

    def join(self, params: PyTree, rest: PyTree) -> PyTree:
        both = zip(self.parts, self._unpack(params), self._unpack(rest), strict=True)
        return self._pack([part.join(p, r) for part, p, r in both])

    def apply(
        self, params: PyTree, rest: PyTree, x: PyTree, *, train: bool, key: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        number = len(self.parts)
        keys = [None] * number if key is None else list(jax.random.split(key, number))
        done = [
            part.apply(p, r, x, train=train, key=k)
            for part, p, r, k in zip(
                self.parts, self._unpack(params), self._unpack(rest), keys, strict=True
            )
        ]
        return self._pack([y for y, _ in done]), self._pack([r for _, r in done])

    def export(self, state: PyTree) -> PyTree:
        states = zip(self.parts, self._unpack(state), strict=True)
        return self._pack([part.export(s) for part, s in states])

    def load(self, given: PyTree) -> PyTree:
        if given is None:
            return None
        states = zip(self.parts, self._unpack(given), strict=True)
        return self._pack([part.load(s) for part, s in states])

    def statics(self) -> dict[str, str]:
        names = self.model if isinstance(self.model, dict) else range(len(self.parts))
        return {
            f"model[{name!r}]{path.removeprefix('model')}": text
            for name, part in zip(names, self.parts, strict=True)
            for path, text in part.statics().items()
        }
