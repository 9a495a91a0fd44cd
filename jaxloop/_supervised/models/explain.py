"""Errors of a model, with a sentence that says how jaxloop calls it.

    adapter = explained(adapter)            # init and apply raise the framework's errors, explained

Invariant: the error of a framework stays what it is. It gets a note, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import BoundModel, ModelAdapter, UseFn
from jaxloop.errors import JaxloopError, ModelError


def explained(adapter: ModelAdapter) -> ModelAdapter:
    """Returns the adapter of one model, whose errors say what jaxloop needs.

    Example:
        >>> from jaxloop._supervised.models.pair import adapt
        >>> adapter = explained(adapt((lambda key, x: {}, lambda params, x: params["w"] * x)))
        >>> try:
        ...     adapter.bind({}, (), train=True, key=None).predict(1.0, 2.0)
        ... except TypeError as error:
        ...     print(error.__notes__[0][:35])
        jaxloop: a pair is called as init(k
    """

    def init(key: jax.Array, use: UseFn) -> PyTree:
        return adapter.init(key, lambda bound: use(_Explained(bound, adapter)))

    def bind(params: PyTree, rest: PyTree, /, *, train: bool, key: jax.Array | None) -> BoundModel:
        return _Explained(adapter.bind(params, rest, train=train, key=key), adapter, rest)

    return dataclasses.replace(adapter, init=init, bind=bind)


class _Explained:
    """A bound model whose errors say what jaxloop needs.

    Args:
        bound: The model.
        adapter: Explains its errors.
        rest: Its state besides the parameters before the calls.
    """

    def __init__(self, bound: BoundModel, adapter: ModelAdapter, rest: PyTree = None) -> None:
        self._bound, self._adapter, self._rest = bound, adapter, rest

    @property
    def view(self) -> Any:
        return self._bound.view

    def initialize(self, *args: PyTree, **kwargs: PyTree) -> None:
        with _explaining(self._adapter):
            self._bound.initialize(*args, **kwargs)

    def predict(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        with _explaining(self._adapter):
            return self._bound.predict(*args, **kwargs)

    def rest(self) -> PyTree:
        rest = self._bound.rest()
        _check_structure(self._rest, rest, self._adapter)
        return rest


@contextlib.contextmanager
def _explaining(adapter: ModelAdapter) -> Iterator[None]:
    try:
        yield
    except JaxloopError:
        raise
    except Exception as error:
        sentence = adapter.explain(error)
        if sentence is not None:
            error.add_note(f"jaxloop: {sentence}")
        raise


def _check_structure(rest: PyTree, new_rest: PyTree, adapter: ModelAdapter) -> None:
    """Raises if the forward pass has made or dropped parts of the model's state."""

    def names(tree: PyTree) -> set[str]:
        return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}

    before, after = names(rest), names(new_rest)
    if before == after:
        return
    changes = [f"new {', '.join(sorted(after - before))}"] * bool(after - before)
    changes += [f"no {', '.join(sorted(before - after))}"] * bool(before - after)
    raise ModelError(
        "a forward pass must keep the structure of the model's state, which the loop carries, got "
        f"{' and '.join(changes)}",
        fix=adapter.keeping_structure,
    )


def is_about_arguments(error: BaseException) -> bool:
    """Returns whether Python refused a call because of its arguments."""
    return isinstance(error, TypeError) and "argument" in str(error)
