"""Flax NNX modules, whose model state is an `nnx.State`.

    adapter = adapt(module)

Invariant: the module is split once and never changed. The compiled step works on pure pytrees and
never runs `nnx.jit`.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxloop._core.fingerprint import differences
from jaxloop._core.types import PyTree
from jaxloop._supervised.models.adapter import (
    BoundModel,
    ModelAdapter,
    UseFn,
    check_statics,
)
from jaxloop._supervised.models.explain import is_about_arguments
from jaxloop._supervised.models.statics import statics_of


def accepts(model: object) -> bool:
    """Returns whether ``model`` is an NNX module."""
    return isinstance(model, nnx.Module)


def adapt(module: nnx.Module) -> ModelAdapter:
    """Adapts an NNX module; its state holds all variables, and each `nnx.Param` is trained."""
    graph, start = nnx.split(nnx.clone(module))
    # Training and evaluation differ in static attributes of the module, which are in its graph.
    graphs = {}
    for train in (True, False):
        one = nnx.clone(module)
        one.train() if train else one.eval()
        graphs[train] = nnx.split(one)[0]
    statics = functools.cache(functools.partial(_statics, one))

    def init(key: jax.Array, use: UseFn) -> PyTree:
        del key  # the module is initialized already
        state = jax.tree.map(jnp.asarray, start)
        use(bind(*split(state), train=True, key=None))
        return state

    def bind(params: PyTree, rest: PyTree, /, *, train: bool, key: jax.Array | None) -> BoundModel:
        del key  # the random streams are variables of the module
        # A copy, because variables of the outer trace cannot be changed inside a gradient.
        merged = nnx.merge(graphs[train], params, rest, copy=True)
        return _BoundModule(merged, None if train else rest)

    def split(state: PyTree) -> tuple[PyTree, PyTree]:
        params, rest = nnx.split_state(state, nnx.Param, ...)
        return params, rest

    def load(given: Any) -> PyTree:
        if not isinstance(given, nnx.Module):
            return given
        check_statics(
            _statics(given), statics(), "make the loop with this module, or pass nnx.state(module)"
        )
        return nnx.state(given)

    return ModelAdapter(
        init=init,
        split=split,
        join=lambda params, rest: nnx.merge_state(params, rest),
        bind=bind,
        export=lambda state: nnx.merge(graph, state, copy=True),
        load=load,
        holds_state=True,
        held=_held(module),
        explain=_explain,
        keeping_structure="make every variable of the module in __init__; a module in a loop "
        "cannot sow",
        statics=statics,
    )


class _BoundModule:
    """The `BoundModel` of a module, which an objective gets as it is.

    Args:
        module: The module, which belongs to this step alone.
        rest: Its state besides the parameters, if the calls do not change it.
    """

    def __init__(self, module: nnx.Module, rest: PyTree) -> None:
        self.view, self._rest = module, rest
        self._before = _statics(module)

    def initialize(self, *args: PyTree, **kwargs: PyTree) -> None:
        pass  # a module holds its parameters

    def predict(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return self.view(*args, **kwargs)

    def rest(self) -> PyTree:
        _warn_of_changes(self._before, _statics(self.view))
        return nnx.state(self.view, nnx.Not(nnx.Param)) if self._rest is None else self._rest


def _held(module: nnx.Module) -> dict[int, str]:
    # Modules may share random streams, of which each then draws its own numbers.
    return {
        id(node): ".".join(map(str, path))
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState)
    }


_OF_FLAX = frozenset({"hijax", "ref", "eager_sharding", "mesh", "tag"})
"""What Flax itself adds to the metadata of a variable."""


def _attributes(node: Any) -> dict[str, Any] | None:
    if isinstance(node, nnx.Variable):
        return None if _is_saved(node) else _metadata(node)
    if isinstance(node, nnx.Pytree):
        held = vars(node).items()
        return {name: value for name, value in held if not name.startswith("_pytree__")}
    return None


def _metadata(variable: nnx.Variable[Any]) -> dict[str, Any]:
    known = variable.get_metadata().items()
    return {name: value for name, value in known if name not in _OF_FLAX}


def _is_saved(value: Any) -> bool:
    """Returns whether the state alone tells everything about a value."""
    if isinstance(value, nnx.Variable):
        return type(value).__module__.startswith("flax.") and not _metadata(value)
    return isinstance(value, jax.Array | np.ndarray)


def _statics(module: nnx.Module) -> dict[str, str]:
    return statics_of(module, _attributes, _is_saved)


def _warn_of_changes(before: dict[str, str], after: dict[str, str]) -> None:
    """Warns of attributes that the forward pass changed. A compiled step cannot carry them."""
    changed = differences(before, {path: after.get(path, "missing") for path in before})
    if changed:
        warnings.warn(
            "the model's forward pass changes attributes that are not carried to the next step: "
            f"{'; '.join(changed)}\n  fix: keep a value that changes in an nnx.Variable",
            stacklevel=2,
        )


def _explain(error: Exception) -> str | None:
    if isinstance(error, ValueError) and "rngs" in str(error):
        return (
            "the random streams of an NNX module are part of its state; give them to each layer "
            "when you make it, such as nnx.Dropout(0.5, rngs=rngs)"
        )
    if is_about_arguments(error):
        return "an NNX module is called with the inputs of a batch as its one argument"
    return None
