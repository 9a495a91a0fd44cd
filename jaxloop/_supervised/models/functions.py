"""Models that are init and apply functions, as a `BoundModel`.

    bound = BoundFunctions(init, apply, (params, rest), key=key)
    prediction = bound.predict(x)
    rest = bound.rest()

A model that has no state yet makes it at its first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxloop._core.types import PyTree
from jaxloop.errors import ModelError

InitFn = Callable[..., tuple[PyTree, PyTree]]
"""``(key, *args, **kwargs) -> (params, rest)``."""

ApplyFn = Callable[..., tuple[PyTree, PyTree]]
"""``(params, rest, key, *args, **kwargs) -> (prediction, rest)``."""


class BoundFunctions:
    """A model of two functions at given parameters. Each call gets its own key.

    Args:
        init: Makes the state at the first call.
        apply: The forward pass.
        state: ``(params, rest)``, or None if the first call makes it.
        key: The key of this step, or None.
    """

    def __init__(
        self,
        init: InitFn,
        apply: ApplyFn,
        state: tuple[PyTree, PyTree] | None,
        *,
        key: jax.Array | None,
    ) -> None:
        self._init, self._apply, self._key = init, apply, key
        self._first = self._state = state
        self._num_calls = 0

    @property
    def view(self) -> FunctionView:
        """See `BoundModel`."""
        return FunctionView(self)

    @property
    def first_state(self) -> tuple[PyTree, PyTree]:
        """``(params, rest)`` before the first call.

        Raises:
            ModelError: No call has made them.
        """
        return _made(self._first)

    @property
    def params(self) -> PyTree:
        """The parameters."""
        return self.first_state[0]

    def initialize(self, *args: PyTree, **kwargs: PyTree) -> None:
        """See `BoundModel`."""
        if self._state is None:
            self._first = self._state = self._init(self._key, *args, **kwargs)

    def predict(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """See `BoundModel`."""
        self.initialize(*args, **kwargs)
        key = call_key(self._key, self._num_calls)
        self._num_calls += 1
        params, rest = _made(self._state)
        prediction, rest = self._apply(params, rest, key, *args, **kwargs)
        self._state = params, rest
        return prediction

    def rest(self) -> PyTree:
        """See `BoundModel`."""
        return _made(self._state)[1]


def _made(state: tuple[PyTree, PyTree] | None) -> tuple[PyTree, PyTree]:
    if state is None:
        raise never_called()
    return state


class FunctionView:
    """A model in an objective: a function of its inputs, with its parameters as ``params``.

    Args:
        bound: The model.
    """

    def __init__(self, bound: BoundFunctions) -> None:
        self._bound = bound

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return self._bound.predict(*args, **kwargs)

    @property
    def params(self) -> PyTree:
        """The parameters. A model that is being initialized has them after its first call."""
        return self._bound.params


def call_key(key: jax.Array | None, num_calls: int) -> Any:
    """Returns the key of a call, given the number of earlier ones in the same step."""
    return key if key is None or not num_calls else jax.random.fold_in(key, num_calls)


def never_called() -> ModelError:
    """Returns the error for a model whose parameters no call has made."""
    return ModelError(
        "an objective must call its model, because the first call makes the parameters, got one "
        "that does not",
        fix="call the model in the objective, or pass inputs= to say what the model is called with",
    )
