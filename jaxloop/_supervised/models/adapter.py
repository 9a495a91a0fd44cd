"""The functions that a step needs from a model, and the state that a user passes in.

    adapter = ModelAdapter(init, split, join, bind)
    initialized = adapter.init(key, lambda bound: bound.initialize(x))
    model_state = merge_state(initialized, adapter.load(init_state))
    params, rest = adapter.split(model_state)
    bound = adapter.bind(params, rest, train=True, key=key)
    prediction = bound.predict(x)
    trained = adapter.export(adapter.join(params, bound.rest()))

Invariant: a model state has the form that the user of the model knows, as a pytree of arrays, such
as Linen's variables, an `nnx.State`, ``(params, state)`` for a `Model` and ``params`` for a pair.
Adapters know nothing about the loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxloop._core.fingerprint import MOST_SHOWN, differences
from jaxloop._core.types import PyTree
from jaxloop.errors import ModelError


class BoundModel(Protocol):
    """A model at given parameters, for the calls of one step. It is used once."""

    @property
    def view(self) -> Any:
        """The model as its users know it, such as an NNX module. An objective calls it."""

    def initialize(self, *args: PyTree, **kwargs: PyTree) -> None:
        """Makes the parameters for the inputs of a batch, if the model has none yet."""

    def predict(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Returns the predictions for the inputs of a batch, and first makes the parameters."""

    def rest(self) -> PyTree:
        """Returns the state besides the parameters, after the calls so far."""


class BindFn(Protocol):
    """Makes a `BoundModel`."""

    def __call__(
        self, params: PyTree, rest: PyTree, /, *, train: bool, key: jax.Array | None
    ) -> BoundModel:
        """Returns the model in training or evaluation mode."""


UseFn = Callable[[BoundModel], object]
"""Calls a model that has no parameters yet, so that it makes them."""


def _unchanged(value: PyTree) -> PyTree:
    return value


def _no_explanation(error: Exception) -> str | None:
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class ModelAdapter:
    """A model of any kind, as the functions that a step needs.

    Attributes:
        init: ``(key, use) -> model_state``. It calls ``use`` if only a call makes the parameters.
        split: ``model_state -> (params, rest)``.
        join: ``(params, rest) -> model_state``.
        bind: ``(params, rest, *, train, key) -> bound model``. The key is for what the model draws.
        export: ``model_state -> result``, where the result is what the user of the model works
            with, such as an NNX module.
        load: ``given -> model_state``, where ``given`` is what the user passes as a first state,
            and may be a part of it or None.
        statics: ``() -> {path: description}`` of what the model is made of besides its arrays.
        holds_state: Whether the model itself holds its state, as a module with parameters does.
        held: The paths of the variables that the model refers to, by `id`, besides those of random
            numbers. Several modules may refer to the same one.
        explain: Returns a sentence on what jaxloop needs, for an error of `init` or a prediction,
            or None.
        keeping_structure: What to do if a forward pass changes the structure of the rest.
    """

    init: Callable[[jax.Array, UseFn], PyTree]
    split: Callable[[PyTree], tuple[PyTree, PyTree]]
    join: Callable[[PyTree, PyTree], PyTree]
    bind: BindFn
    export: Callable[[PyTree], Any] = _unchanged
    load: Callable[[Any], PyTree] = _unchanged
    statics: Callable[[], dict[str, str]] = dict
    holds_state: bool = False
    held: Mapping[int, str] = dataclasses.field(default_factory=dict)
    explain: Callable[[Exception], str | None] = _no_explanation
    keeping_structure: str = "return a state with the structure of the one that apply gets"


def check_statics(given: Mapping[str, str], mine: Mapping[str, str], fix: str) -> None:
    """Raises if a module that was passed as a first state has other attributes than the model.

    Raises:
        ModelError: They differ. The error names the attributes.
    """
    found = differences(given, mine)
    if found:
        raise ModelError(
            "init_state must be a module with the attributes of the loop's model, but "
            + "; ".join(found[:MOST_SHOWN]),
            fix=fix,
        )


def merge_state(
    initialized: PyTree, given: PyTree, path: str = "init_state", *, complete: bool = False
) -> PyTree:
    """Returns the initialized model state with the given values in place of its own.

    Args:
        initialized: A model state.
        given: A model state or a part of one, in which dicts may lack names. None changes nothing.
        path: The place in ``given``, for the error messages.
        complete: Whether a name that ``given`` lacks is an error.

    Raises:
        ModelError: The model does not have a given name, or a leaf has another shape, or
            ``complete`` and a name is missing.

    Example:
        >>> merge_state({"a": jnp.zeros(2), "b": jnp.zeros(1)}, {"a": jnp.ones(2)})["a"]
        Array([1., 1.], dtype=float32)
    """
    if given is None:
        if complete:
            raise ModelError(
                f"{path} must be the state of a model, got None",
                fix="pass the whole state of the model, as the trainer returns it",
            )
        return initialized
    if isinstance(initialized, Mapping) and isinstance(given, Mapping):
        unknown = [name for name in given if name not in initialized]
        if unknown:
            raise ModelError(
                f"{path} must have only the names of the model's state "
                f"({', '.join(map(repr, initialized)) or 'none'}), got {unknown[0]!r}",
                fix="pass the state of this model, or a part of it",
            )
        missing = [name for name in initialized if name not in given]
        if complete and missing:
            raise ModelError(
                f"{path} must have every name of the model's state "
                f"({', '.join(map(repr, initialized))}), got none for {missing[0]!r}",
                fix="pass the whole state of the model, as the trainer returns it",
            )
        merged = {
            name: value
            if name in missing
            else merge_state(value, given[name], f"{path}[{name!r}]", complete=complete)
            for name, value in initialized.items()
        }
        return merged if isinstance(initialized, dict) else type(initialized)(merged)  # type: ignore[call-arg]  # nnx.State takes a mapping
    if (
        type(initialized) in (tuple, list)
        and isinstance(given, tuple | list)
        and len(given) == len(initialized)
    ):
        return type(initialized)(
            merge_state(a, b, f"{path}[{i}]", complete=complete)
            for i, (a, b) in enumerate(zip(initialized, given, strict=True))
        )
    return _replace_leaves(initialized, given, path)


def _replace_leaves(initialized: PyTree, given: PyTree, path: str) -> PyTree:
    """Returns the leaves of ``given`` as arrays, in the dtypes of ``initialized``."""
    expected: object = jax.tree.structure(initialized)
    found: object = jax.tree.structure(given)
    if expected != found:
        raise ModelError(
            f"{path} must have the structure of the model's state, {expected}, got {found}",
            fix="pass the state of this model, or a part of it",
        )

    def one(where: tuple[Any, ...], old: jax.Array, new: Any) -> jax.Array:
        new = jnp.asarray(new) if not isinstance(new, jax.Array) else new
        if new.shape != old.shape:
            raise ModelError(
                f"{path}{jax.tree_util.keystr(where)} must have shape {old.shape}, got {new.shape}",
                fix="pass the state of a model with layers of the same sizes",
            )
        # The dtype may differ, for example in a checkpoint in bfloat16.
        return new if new.dtype == old.dtype else new.astype(old.dtype)

    return jax.tree_util.tree_map_with_path(one, initialized, given)
