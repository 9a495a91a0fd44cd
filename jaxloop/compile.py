"""The executables: a step and its metrics as one compiled block with a traced bound.

    program = specialize(step_fn, collection, batch, state, fuse="auto", jit=True)
    accs = program.init_metrics()
    out = program.run((state, accs), source, start, bound)    # any number of batches, same bits
    values = program.values(out.ring, 0, 10)                  # metrics after ten iterations

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

from jaxloop.data import Batch, Signature
from jaxloop.errors import ArgumentError, ArgumentTypeError, StructureError, unknown_name
from jaxloop.metrics.collection import Bound, Collection
from jaxloop.sources import Single, Stacked
from jaxloop.state import split_emission, structure

PyTree = Any

CAPACITIES = (1024, 256, 64, 32, 16, 8, 4, 2)
"""How many batches a block may hold; the largest that fits is taken."""
NO_DATA_CAPACITY = 4096
"""The same for steps without data, where only the ring of accumulators takes room."""
UNBOUNDED = 2**30
"""The same for steps without data and without metrics: nothing takes room."""
STACK_BYTES, RING_BYTES = 4 * 2**20, 4 * 2**20
"""What a stack of batches and a ring of accumulators may take. More does not fit in the caches of a
CPU, and steps on batches so large are long enough for blocks of a few."""
ROWS_UNFUSED = 16
"""How many batches of steps that run alone are put on the device together."""
USUAL_CAPACITY = 64
LARGE_BYTES = 2**20
"""What they may take together where a block holds more than the usual number of batches."""

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

    Arrays of NumPy are put on the device together, by one explicit transfer.

    Raises:
        StructureError: A leaf is not a number or an array; the error names it.
    """

    def one(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return strong(leaf)
        try:
            dtype = jax.dtypes.canonicalize_dtype(jax.dtypes.result_type(leaf))
            return np.asarray(leaf, dtype)
        except (TypeError, ValueError):
            raise StructureError(
                f"{where}: the leaf step_state{jax.tree_util.keystr(path)} is not an array but "
                f"{type(leaf).__name__} {leaf!r:.80}",
                fix="carry arrays and numbers alone; close the step over everything else",
            ) from None

    return put(jax.tree_util.tree_map_with_path(one, tree))


def put(tree: PyTree) -> PyTree:
    """The tree with NumPy arrays put on the device, by one explicit transfer."""
    leaves, tree_structure = jax.tree.flatten(tree)
    where = [i for i, x in enumerate(leaves) if isinstance(x, np.ndarray | np.generic)]
    for i, array in zip(where, jax.device_put([leaves[i] for i in where]), strict=True):
        leaves[i] = array
    return jax.tree.unflatten(tree_structure, leaves)


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
        return max(2, min(NO_DATA_CAPACITY, RING_BYTES // ring)) if ring else UNBOUNDED
    for capacity in CAPACITIES:
        if capacity > USUAL_CAPACITY and capacity * (row + ring) > LARGE_BYTES:
            continue
        if capacity * row <= STACK_BYTES and capacity * ring <= RING_BYTES:
            return capacity
    return 1


def rows_of(capacity: int, batch: PyTree) -> int:
    """How many batches a stack may hold; of steps that run alone too, which read it one by one."""
    if capacity > 1:
        return capacity
    row = max(1, _size_bytes(batch))
    return max(1, min(ROWS_UNFUSED, STACK_BYTES // row))


@dataclasses.dataclass(eq=False)
class Program:
    """The executables of one step, its metrics and one state structure.

    Attributes:
        capacity: How many iterations a block may hold; 1: never fused.
        rows: How many batches a stack may hold.
        span: How many iterations a block should have so as to be neither short nor long: whoever
            has a clock says so; None: nobody has yet.
    """

    step: Step
    bound: Bound
    capacity: int
    rows: int
    options: dict[str, Any] | None
    span: int | None = None

    def __post_init__(self) -> None:
        block = self._single if self.capacity == 1 else self._block
        self._call: Callable[..., Any] = block
        self._init: Callable[[], list[jax.Array]] = self._fresh_metrics
        if self.options is not None:
            self._call = jax.jit(block, **{"donate_argnums": (0,), **self.options})
            self._init = jax.jit(self._fresh_metrics)
        self._accumulators = jax.eval_shape(self.bound.init)
        self._compute = jax.jit(self._compute_rows)
        self._fresh: dict[str, PyTree] | None = None

    @property
    def room(self) -> int:
        """How many iterations the next block may have."""
        return min(self.capacity, self.span or 1)

    def fresh_values(self) -> dict[str, PyTree]:
        """The metrics before the first update, as NumPy values."""
        if self._fresh is None:
            ring = jax.tree.map(lambda a: a[None], self.init_metrics())
            fetch = self.values(ring, *put((np.int32(0), np.int32(1))))
            self._fresh = jax.tree.map(lambda x: x[0], fetch())
        return self._fresh

    def init_metrics(self) -> list[jax.Array]:
        """Fresh accumulators, all of one dtype in one vector."""
        return self._init()

    def _fresh_metrics(self) -> list[jax.Array]:
        return _packed(self.bound.init())

    def _advance(self, carry: Any, batch: PyTree) -> tuple[PyTree, PyTree, dict[str, PyTree]]:
        state, accs = carry
        new, outputs = self.step(batch, state)
        accs = self.bound.update(_unpacked(accs, self._accumulators), outputs, new, batch)
        return new, _packed(accs), outputs

    def _single(self, carry: Any, source: Any, start: Any, bound: Any) -> Output:
        state, accs, outputs = self._advance(carry, source.row(start))
        ring = jax.tree.map(lambda a: a[None], accs)
        return Output((state, accs), outputs, ring, _after(bound))

    def _block(self, carry: Any, source: Any, start: Any, bound: Any) -> Output:
        row = jax.eval_shape(source.row, jax.ShapeDtypeStruct((), jnp.int32))
        outputs = self.step.outputs(row, carry[0])
        ring = jax.tree.map(
            lambda a: _zeros(jax.ShapeDtypeStruct((self.capacity, *a.shape), a.dtype)),
            carry[1],
        )

        def body(i: Any, loop: Any) -> Any:
            carry, _, ring = loop
            state, accs, outputs = self._advance(carry, source.row(start + i))
            ring = jax.tree.map(
                lambda rows, a: lax.dynamic_update_index_in_dim(rows, a, i, 0), ring, accs
            )
            return (state, accs), outputs, ring

        begin = (carry, jax.tree.map(_zeros, outputs), ring)
        # A lower bound of the same dtype as the upper one: 64 bits would not mix with 32.
        carry, outputs, ring = lax.fori_loop(jnp.int32(0), bound, body, begin)
        return Output(carry, outputs, ring, _after(bound))

    def run(self, carry: tuple[PyTree, PyTree], source: Any, start: Any, bound: Any) -> Output:
        """Runs the step over rows ``start`` to ``start + bound`` of ``source``.

        The carry is donated. The marker is ready when the block is done.
        """
        return self._call(carry, source, start, bound)

    def _compute_rows(self, ring: PyTree, start: Any, stop: Any) -> dict[str, PyTree]:
        # One body for one row and for many, so that a value does not depend on who wants others.
        rows = jax.tree.leaves(ring)[0].shape[0] if jax.tree.leaves(ring) else 1

        def row(i: Any) -> dict[str, PyTree]:
            at = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), ring)
            return self.bound.compute(_unpacked(at, self._accumulators))

        shapes = jax.eval_shape(row, jax.ShapeDtypeStruct((), jnp.int32))
        values = jax.tree.map(lambda v: jnp.zeros((rows, *v.shape), v.dtype), shapes)

        def body(i: Any, values: dict[str, PyTree]) -> dict[str, PyTree]:
            return jax.tree.map(
                lambda all, one: lax.dynamic_update_index_in_dim(all, one, i, 0), values, row(i)
            )

        return lax.fori_loop(start, stop, body, values)

    def values(self, ring: PyTree, start: Any, stop: Any) -> Callable[[], dict[str, PyTree]]:
        """The metrics of the rows from ``start`` to ``stop``, computed now, without waiting.

        Returns:
            A function that gives them as NumPy arrays with a leading axis of rows; the copy to the
            host has begun, and is waited for there.
        """
        computed = self._compute(ring, start, stop) if self.bound.names else {}
        for leaf in jax.tree.leaves(computed):
            leaf.copy_to_host_async()
        return functools.partial(jax.device_get, computed)

    def lower(self, carry: PyTree, batch: PyTree) -> Any:
        """The block, lowered for shapes; for reports."""
        source: Any = Single(abstract(batch))
        if jax.tree.leaves(batch):
            shape = jax.ShapeDtypeStruct
            source = Stacked(jax.tree.map(lambda b: shape((self.rows, *b.shape), b.dtype), batch))
        number = jax.ShapeDtypeStruct((), jnp.int32)
        call = jax.jit(self._single) if self.options is None else self._call
        return call.lower(abstract(carry), source, number, number)  # type: ignore[attr-defined]  # jitted


def _packed(accs: PyTree) -> list[jax.Array]:
    """Accumulators as one vector a dtype: XLA updates few arrays in less time than many."""
    return [
        jnp.concatenate([jnp.ravel(leaves[i]) for i in group])
        for leaves in [jax.tree.leaves(accs)]
        for group in _by_dtype(leaves)
    ]


def _unpacked(vectors: list[jax.Array], like: PyTree) -> PyTree:
    """What was packed, with the structure and shapes of ``like``."""
    leaves, tree = jax.tree.flatten(like)
    for vector, group in zip(vectors, _by_dtype(leaves), strict=True):
        start = 0
        for i in group:
            size = int(np.prod(leaves[i].shape))
            leaves[i] = vector[start : start + size].reshape(leaves[i].shape)
            start += size
    return jax.tree.unflatten(tree, leaves)


def _by_dtype(leaves: list[Any]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault(leaf.dtype, []).append(index)
    return list(groups.values())


def _after(bound: Any) -> Any:
    # An output of its own: JAX hands back an input that is returned as it is, and that is ready
    # long before the block is done.
    return bound + jnp.int32(1)


class Step:
    """A step, traced once for each signature of its batch, checked, and split into its results.

    Args:
        step_fn: The user's.
        eager: Whether it runs op by op, untraced.
    """

    def __init__(self, step_fn: Callable[[PyTree, PyTree], PyTree], *, eager: bool) -> None:
        self._fn, self._eager = step_fn, eager
        self._traces: dict[Signature, tuple[Any, Any]] = {}

    def trace(self, batch: PyTree, state: PyTree) -> tuple[Any, Any]:
        """The closed jaxpr and the shapes of ``(next state, outputs)``, for shapes."""
        shapes = abstract((batch, state))
        key = state_signature(shapes)
        if key not in self._traces:
            self._traces[key] = jax.make_jaxpr(self._checked, return_shape=True)(*shapes)
        return self._traces[key]

    def _checked(self, batch: PyTree, state: PyTree) -> tuple[PyTree, dict[str, PyTree]]:
        new, outputs = split_emission(self._fn(batch, state))
        return checked_state(new, state), jax.tree.map(as_array, outputs)

    def outputs(self, batch: PyTree, state: PyTree) -> dict[str, PyTree]:
        """The shapes of what the step reports."""
        return self.trace(batch, state)[1][1]

    def __call__(self, batch: PyTree, state: PyTree) -> tuple[PyTree, dict[str, PyTree]]:
        if self._eager:
            return self._checked(batch, state)
        jaxpr, shapes = self.trace(batch, state)
        flat = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *jax.tree.leaves((batch, state)))
        return jax.tree.unflatten(jax.tree.structure(shapes), flat)


class Programs:
    """A loop's memory of its programs, so that a second run compiles nothing."""

    def __init__(self) -> None:
        self._programs: dict[Any, Program] = {}
        self._inits: dict[Any, Any] = {}
        self.numbers: dict[Any, Any] = {}
        """Small integers that are on a device already."""

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
        if key in self._programs:
            return self._programs[key]
        step = Step(step_fn, eager=options is None)
        shapes = abstract(batch.value)
        jaxpr, (new, outputs) = step.trace(shapes, state)
        bound = collection.bind(outputs, new, shapes)
        capacity = (
            1 if options is None else capacity_of(jaxpr, shapes, jax.eval_shape(bound.init), fuse)
        )
        program = Program(step, bound, capacity, rows_of(capacity, shapes), options)
        self._programs[key] = program
        return program

    def init(self, init_fn: Callable[..., PyTree], jit: bool) -> Callable[..., PyTree]:
        """``init_fn`` under `jax.jit`, made once."""
        if not jit:
            return init_fn
        if init_fn not in self._inits:
            self._inits[init_fn] = jax.jit(init_fn)
        return self._inits[init_fn]
