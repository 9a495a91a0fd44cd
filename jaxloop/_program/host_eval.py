"""Small pure functions, evaluated on the host with NumPy from their jaxpr.

    fresh = on_host(metrics.init)                        # None if NumPy cannot evaluate it
    accumulators = fresh()
    values = on_host_rows(metrics.compute, accumulators)
    values(rows)                                         # any number of rows, on a leading axis

An executable for a handful of scalars takes longer to compile and to dispatch than the scalars take
to compute. Invariants: each operation is exact or rounds once, so its result has the bits that XLA
gives for it alone, except that XLA's CPU backend flushes subnormal numbers to zero and NumPy keeps
them. A function that contains any other operation is not evaluated here. The value of a row does
not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxloop._core.types import PyTree
from jaxloop._program.host_rules import (
    RULES,
    VIEWS,
    Fn,
    HostArray,
    UnsupportedError,
    kind_of,
    of_rows,
)

_Step: TypeAlias = Callable[[list[Any]], None]
_Equations: TypeAlias = list[tuple[Fn, list[int], int]]
"""Functions of NumPy arrays, each with the slots of its inputs and of its output."""


def on_host(fn: Callable[..., PyTree], *args: PyTree) -> Callable[..., PyTree] | None:
    """Returns a function that evaluates ``fn`` on the host, or None if that is not supported.

    Args:
        fn: A pure function. It is traced once, here.
        *args: Its arguments, as arrays or `jax.ShapeDtypeStruct`.

    Returns:
        A function of NumPy arrays like ``args``. It returns NumPy arrays, in memory of their own,
        in the tree that ``fn`` returns.
    """
    rows = on_host_rows(fn, *args)
    if rows is None:
        return None

    def evaluate(*args: PyTree) -> PyTree:
        values = rows(*jax.tree.map(lambda x: np.asarray(x)[None], args))
        return jax.tree.map(lambda x: x.reshape(x.shape[1:]), values)

    return evaluate


def on_host_rows(fn: Callable[..., PyTree], *row: PyTree) -> Callable[..., PyTree] | None:
    """Returns a function that evaluates ``fn`` for each row, or None if that is not supported.

    Args:
        fn: A pure function of one row. It is traced once, here.
        *row: Its arguments, as arrays or `jax.ShapeDtypeStruct`.

    Returns:
        A function of NumPy arrays like ``row`` with a leading axis of rows. Their number may differ
        from call to call. It returns NumPy arrays with a leading axis of rows, in memory of their
        own, in the tree that ``fn`` returns. Without arguments, it returns one row.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*row)
    tree = jax.tree.structure(shapes)
    try:
        program = _HostProgram(closed)
    except UnsupportedError:
        return None
    return lambda *rows: jax.tree.unflatten(tree, program.run(jax.tree.leaves(rows)))


_CALLS = {
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
}
"""The primitives that call a jaxpr, each with the parameter that holds it."""


class _HostProgram:
    """A jaxpr as a flat list of steps, each of which reads and writes slots of one list.

    Equations of constants are evaluated here, once. The calls in the jaxpr are inlined.
    """

    def __init__(self, closed: ClosedJaxpr) -> None:
        if closed.effects:
            raise UnsupportedError
        self._slots: list[HostArray | None] = []
        """The constants. The slot of any other value is None until a run fills it."""
        self._is_own: list[bool] = []
        equations: _Equations = []
        arguments = [self._new_slot(None) for _ in closed.jaxpr.invars]
        self._arguments = [(v.aval.dtype, v.aval.shape) for v in closed.jaxpr.invars]
        self._outputs = self._inline(closed.jaxpr, closed.consts, arguments, equations)
        self._steps = _needed_steps(equations, self._outputs)

    def run(self, arguments: Sequence[HostArray]) -> list[HostArray]:
        """Returns the outputs for arguments that have a leading axis of rows."""
        slots: list[Any] = self._slots.copy()
        for index, (array, (dtype, shape)) in enumerate(
            zip(arguments, self._arguments, strict=True)
        ):
            assert array.dtype == dtype and array.shape[1:] == shape, (array.dtype, array.shape)
            slots[index] = array
        with np.errstate(all="ignore"):
            for step in self._steps:
                step(slots)
        num_rows = len(arguments[0]) if arguments else 1
        return [slots[i] if self._is_own[i] else of_rows(slots[i], num_rows) for i in self._outputs]

    def _inline(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        arguments: Sequence[int],
        equations: _Equations,
    ) -> list[int]:
        """Adds the equations of a jaxpr, and returns the slots of its outputs."""
        if jaxpr.effects:
            raise UnsupportedError
        of = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            of[var] = self._constant(const, var.aval)

        def slot(atom: Any) -> int:
            return self._constant(atom.val, atom.aval) if isinstance(atom, Literal) else of[atom]

        for equation in jaxpr.eqns:
            inputs = [slot(atom) for atom in equation.invars]
            if equation.primitive.name in _CALLS:
                inner = equation.params[_CALLS[equation.primitive.name]]
                inner_consts = getattr(inner, "consts", ())
                inner = getattr(inner, "jaxpr", inner)
                outputs = self._inline(inner, inner_consts, inputs, equations)
                of.update(zip(equation.outvars, outputs, strict=True))
            else:
                of[equation.outvars[0]] = self._add(equation, inputs, equations)
        return [slot(atom) for atom in jaxpr.outvars]

    def _add(
        self,
        equation: JaxprEqn,
        inputs: list[int],
        equations: _Equations,
    ) -> int:
        name = equation.primitive.name
        if name not in RULES or len(equation.outvars) != 1:
            raise UnsupportedError
        for atom in (*equation.invars, *equation.outvars):
            kind_of(atom.aval)
        fn = RULES[name](equation)
        values = [self._slots[i] for i in inputs]
        if all(value is not None for value in values):
            with np.errstate(all="ignore"):
                return self._new_slot(fn(*values))
        out = self._new_slot(None, is_own=name not in VIEWS)
        equations.append((fn, inputs, out))
        return out

    def _constant(self, value: Any, aval: Any) -> int:
        kind_of(aval)
        if not getattr(value, "is_fully_addressable", True):
            raise UnsupportedError
        return self._new_slot(np.asarray(value, aval.dtype)[None])

    def _new_slot(self, value: HostArray | None, *, is_own: bool = False) -> int:
        self._slots.append(value)
        self._is_own.append(is_own)
        return len(self._slots) - 1


def _needed_steps(equations: _Equations, outputs: Sequence[int]) -> list[_Step]:
    needed = set(outputs)
    steps = []
    for fn, inputs, out in reversed(equations):
        if out in needed:
            needed.update(inputs)
            steps.append(_step(fn, inputs, out))
    return steps[::-1]


def _step(fn: Fn, inputs: Sequence[int], out: int) -> _Step:
    # One function for each number of inputs, because a general one takes longer than NumPy does.
    if len(inputs) == 1:
        (a,) = inputs

        def step(slots: list[Any]) -> None:
            slots[out] = fn(slots[a])

    elif len(inputs) == 2:
        a, b = inputs

        def step(slots: list[Any]) -> None:
            slots[out] = fn(slots[a], slots[b])

    else:

        def step(slots: list[Any]) -> None:
            slots[out] = fn(*[slots[i] for i in inputs])

    return step
