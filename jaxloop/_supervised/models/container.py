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
from jaxloop._supervised.models.adapter import BoundModel, ModelAdapter, UseFn
from jaxloop.errors import ModelError


def parts_of(model: Any) -> list[Any]:
    """Returns the models in a tuple, list or dict. Other models have no parts."""
    if isinstance(model, dict):
        return list(model.values())
    return list(model) if isinstance(model, tuple | list) else []


def adapt(model: Any, parts: Sequence[ModelAdapter]) -> ModelAdapter:
    """Adapts a container of models, given the adapter of each.

    Raises:
        ModelError: Two of the models share a variable, of which each would train its own copy.
    """
    held: dict[int, str] = {}
    for part in parts:
        shared = [path for key, path in part.held.items() if key in held]
        if shared:
            raise ModelError(
                f"the models of a container must not share variables, got {shared[0]!r} in two of "
                "them, and each would train its own copy",
                fix="put them into one module, such as nnx.Dict(a=..., b=...)",
            )
        held.update(part.held)
    container = _Container(model, parts)
    return ModelAdapter(
        container.init,
        container.split,
        container.join,
        container.bind,
        container.export,
        container.load,
        holds_state=all(part.holds_state for part in parts),
        held=held,
        statics=container.statics,
    )


@dataclasses.dataclass(frozen=True)
class _Container:
    """The functions of a `ModelAdapter`, each of which calls those of the parts."""

    model: Any
    parts: Sequence[ModelAdapter]

    def pack(self, values: list[PyTree]) -> PyTree:
        """Returns one value per part as a container like the model."""
        if isinstance(self.model, dict):
            return dict(zip(self.model, values, strict=True))
        return type(self.model)(values)

    def unpack(self, container: PyTree) -> list[PyTree]:
        """Returns the value of each part. None, or a name that a dict lacks, gives None."""
        if container is None:
            return [None] * len(self.parts)
        if isinstance(self.model, dict):
            return [container.get(name) for name in self.model]
        return list(container)

    def init(self, key: jax.Array, use: UseFn) -> PyTree:
        """Initializes the parts together, because one use calls them all."""
        keys = jax.random.split(key, len(self.parts))
        states: list[PyTree] = []

        def initialize_from(index: int, bound: list[BoundModel]) -> None:
            if index == len(self.parts):
                use(_BoundContainer(self, bound))
                return
            # Each part is used inside the init function of the one before it, so the last part is
            # the first to have its state.
            init = self.parts[index].init
            rest = lambda one: initialize_from(index + 1, [*bound, one])  # noqa: E731
            states.insert(0, init(keys[index], rest))

        initialize_from(0, [])
        return self.pack(states)

    def split(self, state: PyTree) -> tuple[PyTree, PyTree]:
        pairs = [part.split(s) for part, s in zip(self.parts, self.unpack(state), strict=True)]
        return self.pack([p for p, _ in pairs]), self.pack([r for _, r in pairs])

    def join(self, params: PyTree, rest: PyTree) -> PyTree:
        both = zip(self.parts, self.unpack(params), self.unpack(rest), strict=True)
        return self.pack([part.join(p, r) for part, p, r in both])

    def bind(
        self, params: PyTree, rest: PyTree, /, *, train: bool, key: jax.Array | None
    ) -> BoundModel:
        states = zip(self.parts, self.unpack(params), self.unpack(rest), strict=True)
        return _BoundContainer(
            self,
            [
                part.bind(
                    p, r, train=train, key=None if key is None else jax.random.fold_in(key, i)
                )
                for i, (part, p, r) in enumerate(states)
            ],
        )

    def export(self, state: PyTree) -> PyTree:
        states = zip(self.parts, self.unpack(state), strict=True)
        return self.pack([part.export(s) for part, s in states])

    def load(self, given: PyTree) -> PyTree:
        if given is None:
            return None
        states = zip(self.parts, self.unpack(given), strict=True)
        return self.pack([part.load(s) for part, s in states])

    def statics(self) -> dict[str, str]:
        names = self.model if isinstance(self.model, dict) else range(len(self.parts))
        return {
            f"model[{name!r}]{path.removeprefix('model')}": text
            for name, part in zip(names, self.parts, strict=True)
            for path, text in part.statics().items()
        }


class _BoundContainer:
    """The `BoundModel` of a container. An objective gets the container of the parts' views."""

    def __init__(self, container: _Container, bound: Sequence[BoundModel]) -> None:
        self._container, self._bound = container, bound

    @property
    def view(self) -> Any:
        return self._container.pack([one.view for one in self._bound])

    def initialize(self, *args: PyTree, **kwargs: PyTree) -> None:
        for one in self._bound:
            one.initialize(*args, **kwargs)

    def predict(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return self._container.pack([one.predict(*args, **kwargs) for one in self._bound])

    def rest(self) -> PyTree:
        return self._container.pack([one.rest() for one in self._bound])
