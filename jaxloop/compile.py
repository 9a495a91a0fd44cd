"""The executables: a step and its metrics as one compiled block with a traced bound.

    program = specialize(step_fn, collection, batch, state, fuse="auto", jit=True)
    accs = program.init_metrics()
    out = program.run((state, accs), batches)       # any number of batches, same bits
    program.values(out.ring)                        # every metric after every iteration

Nothing about handlers, observers, logging or block lengths enters here. The compiled program is a
function of step, metrics, shapes and ``fuse`` alone: XLA contracts multiplications and additions by
context, so a program that knew who watches would differ in its last bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxloop.data import Batch, Signature, stack
from jaxloop.errors import ArgumentError, ArgumentTypeError, StructureError, unknown_name
from jaxloop.metrics.collection import Bound, Collection
from jaxloop.state import split_emission, structure, to_host

PyTree = Any

CAPACITIES = (64, 32, 16, 8, 4, 2)
"""How many batches a block may hold; the largest that fits `STACK_BYTES` is taken."""
NO_DATA_CAPACITY = 1024
"""The same for steps without data, where only the ring of accumulators takes room."""
STACK_BYTES = 16 * 2**20
RING_BYTES = 4 * 2**20

SLOW_IN_CPU_LOOPS = ("conv_general_dilated",)
"""Primitives whose gradients XLA runs an order of magnitude slower inside a loop on CPU."""

JIT_OPTIONS = ("compiler_options", "donate_argnums", "keep_unused", "inline")


class Output(NamedTuple):
    """What a block gives: the new carry, the last outputs, and a row of accumulators a step."""

    carry: tuple[PyTree, PyTree]
    outputs: dict[str, PyTree]
    ring: PyTree
    marker: Any


def abstract(tree: PyTree) -> PyTree:
    """Shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def state_signature(tree: PyTree) -> Signature:
    """The structure, shapes and dtypes of a step state."""
    leaves, tree_structure = jax.tree.flatten(tree)
    return Signature(tree_structure, tuple((x.shape, x.dtype) for x in leaves))


def as_state(tree: PyTree, where: str) -> PyTree:
    """A step state's leaves as strongly typed arrays; Python numbers get JAX's default dtypes.

    Raises:
        StructureError: A leaf is not a number or an array; the error names it.
    """

    def one(path: Any, leaf: Any) -> Any:
        try:
            array = as_array(leaf)
        except (TypeError, ValueError):
            raise StructureError(
                f"{where}: the leaf step_state{jax.tree_util.keystr(path)} is not an array but "
                f"{type(leaf).__name__} {leaf!r:.80}",
                fix="carry arrays and numbers alone; close the step over everything else",
            ) from None
        return strong(array)

    return jax.tree_util.tree_map_with_path(one, tree)


def strong(array: jax.Array) -> jax.Array:
    """The array without a weak type, which would cost a second compilation."""
    weak = getattr(array, "weak_type", False)  # typed keys have no such attribute
    return lax.convert_element_type(array, array.dtype) if weak else array


def as_array(leaf: Any) -> jax.Array:
    """The leaf as an array; typed keys and tracers pass as they are."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


@functools.partial(jax.jit, inline=True)
def copy(tree: PyTree) -> PyTree:
    """New buffers for every leaf, in one dispatch; also where two leaves were one buffer."""
    return jax.tree.map(jnp.copy, tree)


def checked_state(new: PyTree, old: PyTree) -> PyTree:
    """The state that a step returned, if it has the structure, shapes and dtypes of the last.

    Raises:
        StructureError: It has not; the error names the leaf, what was and what came.
    """
    fix = (
        "return a state of the same structure, shapes and dtypes; report what the next step does "
        "not need with jl.emit(next_state, name=value)"
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


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, shape)
        return jax.random.wrap_key_data(
            jnp.zeros(data.shape, data.dtype),
            impl=jax.random.key_impl(shape),  # type: ignore[arg-type]  # a dtype is all it needs
        )
    return jnp.zeros(shape.shape, shape.dtype)


def _contains(jaxpr: Any, names: tuple[str, ...]) -> bool:
    """Whether a primitive occurs in a jaxpr, all the way down through ``eqn.params``."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in inner.eqns:
        if eqn.primitive.name in names:
            return True
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if (hasattr(part, "eqns") or hasattr(part, "jaxpr")) and _contains(part, names):
                    return True
    return False


def _size_bytes(tree: PyTree) -> int:
    return sum(
        int(np.prod(x.shape)) * getattr(x.dtype, "itemsize", 8) for x in jax.tree.leaves(tree)
    )


def check_fuse(fuse: object) -> None:
    """Raises unless ``fuse`` is "auto" or a whole number from 1."""
    if isinstance(fuse, str):
        if fuse != "auto":
            raise unknown_name("fuse", fuse, ["auto"])
    elif isinstance(fuse, bool) or not isinstance(fuse, int):
        raise ArgumentTypeError(f"run: fuse must be 'auto' or a whole number, and is {fuse!r}")
    elif fuse < 1:
        raise ArgumentError(f"run: fuse must be at least 1, and is {fuse}")


def jit_options(jit: object) -> dict[str, Any] | None:
    """The options for `jax.jit` that ``jit`` means; None: run op by op."""
    if isinstance(jit, bool):
        return {} if jit else None
    if not isinstance(jit, Mapping):
        raise ArgumentTypeError(f"run: jit must be True, False or a dict of options, not {jit!r}")
    for name in jit:
        if name not in JIT_OPTIONS:
            raise unknown_name("option of jit", name, JIT_OPTIONS)
    return dict(jit)


def capacity_of(jaxpr: Any, batch: PyTree, accumulators: PyTree, fuse: object) -> int:
    """How many iterations a block may hold; 1: the step runs alone, outside any loop.

    Decided from the jaxpr, the platform and the sizes alone, and so never different between runs.
    """
    if isinstance(fuse, int):
        return fuse
    if jax.default_backend() == "cpu" and _contains(jaxpr, SLOW_IN_CPU_LOOPS):
        return 1
    row, ring = _size_bytes(batch), _size_bytes(accumulators)
    if not jax.tree.leaves(batch):
        return max(2, min(NO_DATA_CAPACITY, RING_BYTES // max(ring, 1)))
    for capacity in CAPACITIES:
        if capacity * row <= STACK_BYTES and capacity * ring <= RING_BYTES:
            return capacity
    return 1


@dataclasses.dataclass(eq=False)
class Program:
    """The executables of one step, its metrics and one state structure.

    Attributes:
        capacity: How many iterations a block may hold; 1: never fused.
    """

    step_fn: Callable[[PyTree, PyTree], PyTree]
    bound: Bound
    capacity: int
    options: dict[str, Any] | None
    state: PyTree
    """The structure of the step state, as shapes."""
    jaxpr: Any

    def __post_init__(self) -> None:
        block = self._single if self.capacity == 1 else self._block
        eager = self.options is None
        if self.options is None:
            self._call: Callable[..., Any] = block
        else:
            self._call = jax.jit(block, **{"donate_argnums": (0,), **self.options})
        self._init = self.bound.init if eager else jax.jit(self.bound.init)
        # One executable for every reader: `lax.map` over the rows, be they one or many.
        self._compute = jax.jit(lambda ring: lax.map(self.bound.compute, ring))

    def init_metrics(self) -> PyTree:
        """Fresh accumulators."""
        return self._init()

    def _advance(self, carry: Any, batch: PyTree) -> tuple[PyTree, PyTree, dict[str, PyTree]]:
        state, accs = carry
        new, outputs = split_emission(self.step_fn(batch, state))
        new = checked_state(new, state)
        outputs = jax.tree.map(as_array, outputs)
        return new, self.bound.update(accs, outputs, new, batch), outputs

    def _single(self, carry: Any, batch: PyTree) -> Output:
        state, accs, outputs = self._advance(carry, batch)
        ring = jax.tree.map(lambda a: a[None], accs)
        return Output((state, accs), outputs, ring, jnp.int32(0))

    def _block(self, carry: Any, batches: PyTree, bound: Any) -> Output:
        first = jax.tree.map(lambda b: jax.ShapeDtypeStruct(b.shape[1:], b.dtype), batches)
        outputs = jax.eval_shape(self._advance, abstract(carry), first)[2]
        ring = jax.tree.map(
            lambda a: jnp.zeros((self.capacity, *a.shape), a.dtype), abstract(carry[1])
        )

        def body(i: Any, loop: Any) -> Any:
            carry, _, ring = loop
            batch = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, i, keepdims=False), batches)
            state, accs, outputs = self._advance(carry, batch)
            ring = jax.tree.map(
                lambda rows, a: lax.dynamic_update_index_in_dim(rows, a, i, 0), ring, accs
            )
            return (state, accs), outputs, ring

        start = (carry, jax.tree.map(_zeros, outputs), ring)
        carry, outputs, ring = lax.fori_loop(0, bound, body, start)
        return Output(carry, outputs, ring, bound)

    def run(self, carry: tuple[PyTree, PyTree], batches: list[Batch]) -> Output:
        """Runs the step over ``batches``, which share a signature; the carry is donated."""
        if self.capacity == 1:
            return self._call(carry, batches[0].value)
        stacked = stack([batch.value for batch in batches], self.capacity)
        if self.options is None:
            return self._eager(carry, batches)
        return self._call(carry, stacked, np.int32(len(batches)))

    def _eager(self, carry: Any, batches: list[Batch]) -> Output:
        rows = []
        outputs: dict[str, PyTree] = {}
        for batch in batches:
            state, accs, outputs = self._advance(carry, batch.value)
            carry = (state, accs)
            rows.append(accs)
        return Output(carry, outputs, jax.tree.map(lambda *a: jnp.stack(a), *rows), jnp.int32(0))

    def values(self, ring: PyTree) -> Callable[[int], dict[str, Any]]:
        """The metrics of every row; computed now, without waiting, and fetched once when read."""
        computed = self._compute(ring) if self.bound.names else {}
        fetched: list[Any] = []

        def row(index: int) -> dict[str, Any]:
            if not fetched:
                fetched.append(jax.tree.map(np.asarray, computed))
            return {
                name: to_host(jax.tree.map(lambda x: x[index], value))
                for name, value in fetched[0].items()
            }

        return row

    def lower(self, carry: PyTree, batch: PyTree) -> Any:
        """The step's block, lowered for shapes; for reports."""
        if self.options is None or self.capacity == 1:
            return jax.jit(self._single).lower(carry, batch)
        shape = jax.ShapeDtypeStruct
        stacked = jax.tree.map(lambda b: shape((self.capacity, *b.shape), b.dtype), batch)
        return self._call.lower(carry, stacked, shape((), np.int32))  # type: ignore[attr-defined]  # a jitted function


class Programs:
    """A loop's memory of its programs, so that a second run compiles nothing."""

    def __init__(self) -> None:
        self._programs: dict[Any, Program] = {}
        self._inits: dict[Any, Any] = {}

    def specialize(
        self,
        step_fn: Callable[[PyTree, PyTree], PyTree],
        collection: Collection,
        batch: Batch,
        state: PyTree,
        *,
        fuse: int | str,
        jit: bool | Mapping[str, Any],
    ) -> Program:
        """The program for a step, metrics, a first batch and a state.

        Raises:
            StructureError: The step changes its state.
        """
        options = jit_options(jit)
        key = (batch.signature, state_signature(state), fuse, repr(options))
        if key not in self._programs:
            self._programs[key] = self._make(step_fn, collection, batch, state, fuse, options)
        return self._programs[key]

    def _make(
        self,
        step_fn: Callable[[PyTree, PyTree], PyTree],
        collection: Collection,
        batch: Batch,
        state: PyTree,
        fuse: int | str,
        options: dict[str, Any] | None,
    ) -> Program:
        def traced(batch: PyTree, state: PyTree) -> Any:
            new, outputs = split_emission(step_fn(batch, state))
            return checked_state(new, state), jax.tree.map(as_array, outputs)

        shapes, state = abstract(batch.value), abstract(state)
        jaxpr, (new, outputs) = jax.make_jaxpr(traced, return_shape=True)(shapes, state)
        bound = collection.bind(abstract(outputs), abstract(new), shapes)
        capacity = capacity_of(jaxpr, shapes, jax.eval_shape(bound.init), fuse)
        return Program(step_fn, bound, capacity, options, state, jaxpr)

    def init(self, init_fn: Callable[..., PyTree], jit: bool) -> Callable[..., PyTree]:
        """``init_fn`` under `jax.jit`, made once."""
        if not jit:
            return init_fn
        if init_fn not in self._inits:
            self._inits[init_fn] = jax.jit(init_fn)
        return self._inits[init_fn]
