"""Pytrees of arrays: shapes, strong types, copies, and checks of a step's state.

    state = copy(as_state({"w": 0.0}, "run(init_state=)"))
    new = checked_state(step(batch, state), state)

A step state's leaves are strongly typed arrays, so that the step compiles once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxloop._core.batch import Signature
from jaxloop._core.types import PyTree
from jaxloop.errors import StructureError


def structure(tree: PyTree) -> Any:
    """Returns the tree's structure as Any, because JAX's stubs do not declare ``==`` for it."""
    return jax.tree.structure(tree)


def abstract(tree: PyTree) -> PyTree:
    """Returns the tree with shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def state_signature(tree: PyTree) -> Signature:
    """Returns the structure, shapes and dtypes of a step state."""
    leaves, tree_structure = jax.tree.flatten(tree)
    return Signature(tree_structure, tuple((x.shape, x.dtype) for x in leaves))


def size_bytes(tree: PyTree) -> int:
    """Returns the total size of a tree's arrays in bytes."""
    return sum(
        int(np.prod(x.shape)) * getattr(x.dtype, "itemsize", 8) for x in jax.tree.leaves(tree)
    )


def as_state(tree: PyTree, where: str) -> PyTree:
    """Returns a step state with every leaf as a strongly typed array on the device.

    Python numbers get JAX's default dtypes. One explicit transfer moves all NumPy arrays.

    Raises:
        StructureError: A leaf is neither a number nor an array; the error names it.
    """
    return put(state_leaves(tree, where))


def state_leaves(tree: PyTree, where: str) -> PyTree:
    """Returns a step state with every leaf as a strongly typed array, of JAX or of NumPy.

    Raises:
        StructureError: See `as_state`.
    """

    def one(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            # JAX compiles the conversion of a weak type. As a NumPy array it needs none.
            host = not isinstance(leaf, jax.core.Tracer) and not leaf.committed
            weak = getattr(leaf, "weak_type", False)
            return np.asarray(leaf) if host and weak else strong(leaf)
        try:
            kind = leaf.dtype if type(leaf) is np.ndarray else jax.dtypes.result_type(leaf)
            return np.asarray(leaf, jax.dtypes.canonicalize_dtype(kind))
        except (TypeError, ValueError):
            raise StructureError(
                f"{where}: the leaf step_state{jax.tree_util.keystr(path)} must be an array or a "
                f"number, got {type(leaf).__name__} {leaf!r:.80}",
                fix="carry only arrays and numbers, and let the step close over everything else",
            ) from None

    return jax.tree_util.tree_map_with_path(one, tree)


def put(tree: PyTree) -> PyTree:
    """Moves the NumPy arrays of a tree to the device, in one explicit transfer."""
    leaves, tree_structure = jax.tree.flatten(tree)
    where = [i for i, x in enumerate(leaves) if isinstance(x, np.ndarray | np.generic)]
    if not where:
        return tree
    for i, array in zip(where, jax.device_put([leaves[i] for i in where]), strict=True):
        leaves[i] = array
    return jax.tree.unflatten(tree_structure, leaves)


def strong(array: jax.Array) -> jax.Array:
    """Returns the array without a weak type, which would cost a second compilation."""
    weak = getattr(array, "weak_type", False)  # typed keys have no such attribute
    return lax.convert_element_type(array, array.dtype) if weak else array


def as_array(leaf: Any) -> jax.Array:
    """Returns the leaf as an array. Typed keys and tracers pass unchanged."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


@functools.partial(jax.jit, inline=True)
def copy(tree: PyTree) -> PyTree:
    """Copies every leaf to a new buffer, in one dispatch, even if two leaves share a buffer."""
    return jax.tree.map(jnp.copy, tree)


def own(tree: PyTree, *, often: bool = False) -> PyTree:
    """Copies every leaf, of JAX or of NumPy, to a new buffer on the device.

    Args:
        tree: The tree.
        often: Whether such a tree is copied often. If not, nothing is compiled. A compiled copy
            takes less time than a transfer of each leaf, but the first one takes far more.
    """
    leaves, tree_structure = jax.tree.flatten(tree)
    # JAX may read the memory of a NumPy array later, or use it as it is, so it gets a copy.
    safe = [leaf if isinstance(leaf, jax.Array) else np.array(leaf) for leaf in leaves]
    if often or any(map(_may_move, leaves)):
        with jax.transfer_guard_host_to_device("allow"):  # the transfer is meant
            return jax.tree.unflatten(tree_structure, copy(safe))
    # As data, because a transfer of typed keys would ignore where they are.
    parts = [data_of(leaf) for leaf in safe]
    made = [
        jax.random.wrap_key_data(new, impl=key_impl(old.dtype)) if is_key(old) else new
        for old, new in zip(leaves, jax.device_put(parts, may_alias=False), strict=True)
    ]
    return jax.tree.unflatten(tree_structure, made)


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def data_of(leaf: Any) -> Any:
    """Returns the data of typed PRNG keys as a plain array, and any other leaf as it is."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _may_move(leaf: Any) -> bool:
    """Returns whether JAX's computations would move an array to the default device."""
    if not isinstance(leaf, jax.Array) or leaf.committed:
        return False
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]  # a documented option
    return chosen is not None or leaf.devices() != {jax.local_devices()[0]}


def copy_later(tree: PyTree) -> PyTree:
    """Copies like `copy`, but returns before the copies are made.

    On a CPU, JAX runs a computation in the caller's thread if it does little arithmetic and its
    inputs are ready. A copy of any size does none, so the loop would wait for it. Some arithmetic
    beside the copies moves them to JAX's own threads.
    """
    copies, _ = _copy_with_arithmetic(tree)
    return copies


@jax.jit
def _copy_with_arithmetic(tree: PyTree) -> tuple[PyTree, jax.Array]:
    return jax.tree.map(jnp.copy, tree), some_arithmetic()


def some_arithmetic() -> jax.Array:
    """Returns an array that takes so much arithmetic that JAX computes it in its own threads.

    A computation that returns it too does not keep the caller waiting on a CPU.
    """
    # The barrier keeps XLA from computing the product when it compiles.
    matrix = jax.lax.optimization_barrier(jnp.ones((16, 16), jnp.float32))
    return matrix @ matrix


def key_impl(dtype: Any) -> str:
    """Returns the PRNG implementation of keys with this dtype.

    Example:
        >>> key_impl(jax.random.key(0, impl="rbg").dtype)
        'rbg'
    """
    found: list[str] = []
    keys = jax.ShapeDtypeStruct((), dtype)
    jax.eval_shape(lambda key: found.append(str(jax.random.key_impl(key))), keys)
    return found[0]


def cast_numbers(new: PyTree, old: PyTree) -> PyTree:
    """Casts Python numbers in ``new`` to the dtypes of ``old``, if the structures match."""
    if structure(new) != structure(old):
        return new
    python = bool | int | float | complex
    return jax.tree.map(
        lambda a, b: jnp.asarray(a, b.dtype) if isinstance(a, python) else a, new, old
    )


def checked_state(new: PyTree, old: PyTree) -> PyTree:
    """Returns a step's new state, after comparing its structure, shapes and dtypes to the old one.

    Raises:
        StructureError: They differ. The error names the leaf and how it changed.
    """
    fix = (
        "return a state with the same structure, shapes and dtypes, and report everything else "
        "with jl.emit(next_state, name=value)"
    )
    if structure(new) != structure(old):
        mine = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(new)}
        was = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(old)}
        parts = [f"new leaves {sorted(mine - was)}"] * bool(mine - was)
        parts += [f"missing leaves {sorted(was - mine)}"] * bool(was - mine)
        what = ", ".join(parts) or f"{jax.tree.structure(old)} became {jax.tree.structure(new)}"
        raise StructureError(f"the step changed the structure of its state: {what}", fix=fix)

    def one(path: Any, a: Any, b: Any) -> Any:
        python = isinstance(a, bool | int | float | complex)
        array = jnp.asarray(a, b.dtype) if python else as_array(a)
        if array.shape != b.shape or array.dtype != b.dtype:
            raise StructureError(
                f"the step changed its state: step_state{jax.tree_util.keystr(path)} was "
                f"{b.dtype}{list(b.shape)} and became {array.dtype}{list(array.shape)}",
                fix=fix,
            )
        return strong(array)

    return jax.tree_util.tree_map_with_path(one, new, old)


def changed_leaves(old: PyTree, new: PyTree) -> list[str]:
    """Returns the paths of the leaves that only one state has, or whose shape or dtype differs."""
    was, became = (
        {
            jax.tree_util.keystr(path): (leaf.shape, leaf.dtype)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (old, new)
    )
    return [path for path in {**was, **became} if was.get(path) != became.get(path)]


def describe_change(old: PyTree, new: PyTree) -> str:
    """Describes which leaves of two step states differ in shape or dtype, for messages."""

    def leaves(tree: PyTree) -> dict[str, str]:
        return {
            jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    was, became = leaves(old), leaves(new)
    parts = [
        f"step_state{name} from {was.get(name, 'nothing')} to {became.get(name, 'nothing')}"
        for name in {**was, **became}
        if was.get(name) != became.get(name)
    ]
    return "; ".join(parts) or f"{jax.tree.structure(old)} to {jax.tree.structure(new)}"


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns an array in float32, or in its own dtype if that is wider or complex.

    This also works under strict dtype promotion, where `jnp.promote_types` refuses to mix.

    Example:
        >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
        dtype('float32')
    """
    if jnp.issubdtype(x.dtype, jnp.inexact) and jnp.finfo(x.dtype).bits >= 32:
        return x
    return x.astype(jnp.float32)
