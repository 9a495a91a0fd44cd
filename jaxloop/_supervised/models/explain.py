"""Errors of a model, with a sentence that says how jaxloop calls it.

    adapter = explained(adapter)            # init and apply raise the framework's errors, explained

Invariant: the error of a framework stays what it is. It gets a note, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import ModelAdapter
from jaxloop.errors import JaxloopError, ModelError


def explained(adapter: ModelAdapter) -> ModelAdapter:
    """Returns the adapter of one model, whose errors say what jaxloop needs.

    Example:
        >>> def apply(params, rest, x, *, train, key):
        ...     return params["w"] * x, rest
        >>> adapter = ModelAdapter(
        ...     init=lambda key, x: {},
        ...     split=lambda state: (state, ()),
        ...     join=lambda params, rest: params,
        ...     apply=apply,
        ...     explain=lambda error: "jaxloop calls apply(params, x)",
        ... )
        >>> try:
        ...     explained(adapter).apply({}, (), 1.0, train=True, key=None)
        ... except KeyError as error:
        ...     print(error.__notes__)
        ['jaxloop: jaxloop calls apply(params, x)']
    """

    def init(key: jax.Array, x: PyTree) -> PyTree:
        with _explaining(adapter):
            return adapter.init(key, x)

    def apply(
        params: PyTree, rest: PyTree, x: PyTree, /, *, train: bool, key: jax.Array | None
    ) -> tuple[PyTree, PyTree]:
        with _explaining(adapter):
            prediction, new_rest = adapter.apply(params, rest, x, train=train, key=key)
        if train:
            _check_structure(rest, new_rest, adapter)
        return prediction, new_rest

    return dataclasses.replace(adapter, init=init, apply=apply)


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
