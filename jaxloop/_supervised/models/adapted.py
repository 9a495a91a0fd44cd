"""What every kind of model is turned into, and the user's own `Model`.

    adapted = adapt(module)
    model_state = adapted.init(key, x)
    params, rest = adapted.split(model_state)
    prediction, rest = adapted.apply(params, rest, x, train=True, key=key)

``model_state`` is the form that the model's user knows, as a pytree of arrays: Linen's variables,
an `nnx.State`, ``(params, state)`` for `Model`, ``params`` for a pair.
Nothing of the loop is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxloop.errors import ModelError

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as two pure functions.

    Attributes:
        init: ``init(key, x) -> (params, state)``: ``params`` is what is trained, ``state`` what the
            forward pass updates.
        apply: ``apply(params, state, x, *, train, key) -> (prediction, state)``.

    Example:
        >>> import jax.numpy as jnp
        >>> def init(key, x):
        ...     return jnp.zeros((x.shape[-1],)), {"calls": jnp.int32(0)}
        >>> def apply(params, state, x, *, train, key):
        ...     return x @ params, {"calls": state["calls"] + 1}
        >>> params, state = Model(init, apply).init(None, jnp.ones((4, 3)))
        >>> params.shape
        (3,)
    """

    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[PyTree, PyTree]]


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A model of any kind, as the functions that a step needs.

    Attributes:
        init: ``(key, x) -> model_state``.
        split: ``model_state -> (params, rest)``.
        join: ``(params, rest) -> model_state``.
        apply: ``(params, rest, x, *, train, key) -> (prediction, rest)``.
        export: ``model_state ->`` what the model's user works with.
        load: What the user gave as a first state ``->`` (a part of) a model state.
    """

    init: Callable[[Any, PyTree], PyTree]
    split: Callable[[PyTree], tuple[PyTree, PyTree]]
    join: Callable[[PyTree, PyTree], PyTree]
    apply: Callable[..., tuple[PyTree, PyTree]]
    export: Callable[[PyTree], Any] = lambda model_state: model_state
    load: Callable[[Any], PyTree] = lambda given: given


def merge_state(initialised: PyTree, given: PyTree, path: str = "init_state") -> PyTree:
    """The initialised model state with what was given in its place.

    Args:
        initialised: A model state.
        given: A model state or a part of one: dicts may lack names. None gives nothing.
        path: What errors call it.

    Raises:
        ModelError: A name that the model does not have, or a leaf of another shape.

    Example:
        >>> merge_state({"a": jnp.zeros(2), "b": jnp.zeros(1)}, {"a": jnp.ones(2)})["a"]
        Array([1., 1.], dtype=float32)
    """
    if given is None:
        return initialised
    if isinstance(initialised, Mapping) and isinstance(given, Mapping):
        unknown = [name for name in given if name not in initialised]
        if unknown:
            raise ModelError(
                f"{path} has {unknown[0]!r}, which the model does not; it has "
                f"{', '.join(map(repr, initialised)) or 'nothing'}",
                fix="pass the state of this model, or a part of it",
            )
        merged = {
            name: merge_state(value, given[name], f"{path}[{name!r}]") if name in given else value
            for name, value in initialised.items()
        }
        return merged if isinstance(initialised, dict) else type(initialised)(merged)  # type: ignore[call-arg]  # as nnx.State takes one
    if (
        type(initialised) in (tuple, list)
        and isinstance(given, tuple | list)
        and len(given) == len(initialised)
    ):
        parts = enumerate(zip(initialised, given, strict=True))
        return type(initialised)([merge_state(a, b, f"{path}[{i}]") for i, (a, b) in parts])
    ours: Any = jax.tree.structure(initialised)
    theirs: Any = jax.tree.structure(given)
    if ours != theirs:
        raise ModelError(
            f"{path} has the structure {theirs}, and the model's is {ours}",
            fix="pass the state of this model, or a part of it",
        )

    def one(where: Any, mine: Any, new: Any) -> Any:
        new = jnp.asarray(new) if not isinstance(new, jax.Array) else new
        if new.shape != mine.shape:
            raise ModelError(
                f"{path}{jax.tree_util.keystr(where)} has shape {new.shape}, and the model's is "
                f"{mine.shape}",
                fix="pass the state of a model of the same sizes",
            )
        # Another dtype (a checkpoint in bfloat16, say) becomes the model's.
        return new if new.dtype == mine.dtype else new.astype(mine.dtype)

    return jax.tree_util.tree_map_with_path(one, initialised, given)
