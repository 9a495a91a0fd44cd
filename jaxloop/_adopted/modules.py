"""NNX modules as a pytree: the variables are its leaves, and the graph of the modules is static.

    carried = split((model, optimizer))         # one graph, so what both refer to stays shared
    model, optimizer = carried.merge()          # new modules
    carried = carried.after((model, optimizer))

Invariant: modules are never changed in place, except those that `merge` has just made.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxloop._adopted.detection import NNX_VARIABLES, has_modules
from jaxloop._core.arrays import as_array, structure
from jaxloop._core.types import PyTree
from jaxloop.errors import StructureError

_OF_A_MODE = frozenset({"deterministic", "use_running_average"})
"""The attributes that ``train()`` and ``eval()`` set. A step sets them anew each time."""


class _Graph:
    """The graph of modules, hashed once, because JAX compares it at each dispatch."""

    __slots__ = ("_hash", "definition")

    def __init__(self, definition: Any) -> None:
        self.definition = definition
        self._hash = hash(definition)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, _Graph) and bool(self.definition == other.definition)
        )

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return "graph"


@jax.tree_util.register_pytree_with_keys_class
class Modules:
    """The variables of NNX modules, and the graph to make the modules from them.

    Attributes:
        nnx_variables: An `nnx.State`.
    """

    __slots__ = ("_graph", NNX_VARIABLES)

    def __init__(self, graph: _Graph, variables: PyTree) -> None:
        self._graph = graph
        self.nnx_variables = variables

    def tree_flatten_with_keys(self) -> tuple[Any, _Graph]:
        return ((jax.tree_util.GetAttrKey(NNX_VARIABLES), self.nnx_variables),), self._graph

    @classmethod
    def tree_unflatten(cls, graph: _Graph, children: tuple[PyTree]) -> Modules:
        return cls(graph, *children)

    def merge(self) -> Any:
        """Returns new modules, in the form in which they were split."""
        return nnx.merge(self._graph.definition, self.nnx_variables, copy=True)

    def is_form_of(self, result: Any) -> bool:
        """Returns whether a result has the form of these modules."""
        if not has_modules(result):
            return False
        definition, variables = _split(result)
        same_root = definition.nodes[:1] == self._graph.definition.nodes[:1]
        return bool(same_root and structure(variables) == structure(self.nnx_variables))

    def after(self, state: Any) -> Modules:
        """Returns these modules after a step has changed them to ``state``.

        Raises:
            StructureError: The step created or deleted a variable, or changed an attribute.
        """
        definition, variables = _split(state)
        if definition != self._graph.definition:
            self._check_graph(definition, variables)
        return Modules(self._graph, variables)

    def _check_graph(self, definition: Any, variables: PyTree) -> None:
        was, became = _paths(self.nnx_variables), _paths(variables)
        if became - was:
            raise StructureError(
                f"the step must not create variables, got {', '.join(sorted(became - was))}",
                fix="create each variable in __init__; if the step sows, remove what was sown "
                "before it returns, as with nnx.pop(model, nnx.Intermediate)",
            )
        if was - became:
            raise StructureError(
                "the step must not delete variables, got none at "
                f"{', '.join(sorted(was - became))}",
                fix="keep the variables that the modules were made with",
            )
        old, new = self._graph.definition.attributes, definition.attributes
        changed = [
            f"{name} from {a.value!r} to {b.value!r}"
            for (name, a), (other, b) in zip(old, new, strict=False)
            if name == other and a != b and name not in _OF_A_MODE and hasattr(b, "value")
        ]
        if changed or len(old) != len(new):
            raise StructureError(
                "the step must not change attributes of modules, because only variables are "
                f"carried, got {'; '.join(changed) or 'another number of attributes'}",
                fix="keep a value that changes in an nnx.Variable",
            )


def split(state: Any) -> Modules:
    """Returns NNX modules, or a pytree of them and of arrays, as `Modules`."""
    definition, variables = _split(state)
    return Modules(_Graph(definition), variables)


def _split(state: Any) -> tuple[Any, PyTree]:
    def one(leaf: Any) -> Any:
        # A Python number would be a static attribute of the graph, and so never change.
        return as_array(leaf) if isinstance(leaf, bool | int | float | complex) else leaf

    is_node = (nnx.Pytree, nnx.Variable)
    definition, variables = nnx.split(
        jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, is_node))
    )
    return definition, variables


def _paths(variables: PyTree) -> set[str]:
    value = jax.tree_util.GetAttrKey("value")  # the array of a variable
    return {
        jax.tree_util.keystr(tuple(key for key in path if key != value), simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(variables)
    }
