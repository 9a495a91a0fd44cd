"""The first step state of a loop, and its shapes, from a sample of the data.

    step_state = make_step_state(spec, sample, init_state, jit=True)
    like = step_state_like(spec, sample, init_state, jit=True)      # to restore a checkpoint
    like = abstract_step_state(spec, data, init_state)

The first compiles the init function and nothing else. The others compile nothing, except that the
second runs an init function that puts arrays on devices of its choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxloop._core.arrays import as_state, own, put, state_leaves
from jaxloop._core.batch import Batch
from jaxloop._core.placement import chooses_devices
from jaxloop._core.step_result import split_emission
from jaxloop._core.types import PyTree
from jaxloop._data.source import sample_of
from jaxloop._spec import LoopSpec, PreparedInit

_FROM_INIT = "the result of init_fn"


def make_step_state(spec: LoopSpec, sample: Batch, init_state: Any, *, jit: bool) -> PyTree:
    """Returns the first step state, as arrays that no other code holds.

    Args:
        spec: The loop.
        sample: The first batch.
        init_state: The ``init_state`` that was passed to `run`.
        jit: Whether the init function is compiled.
    """
    if spec.init_fn is None:
        return own(_given(init_state), often=spec.programs.starts())
    init = _Init.of(spec.init_fn)
    prepared = init.prepare(init_state)
    call = spec.programs.init(init.fn, init.init_fn) if jit else init.unchecked
    state, evidence = call(put(sample.value), put(prepared))
    init.check(evidence)
    return state if jit else own(state_leaves(state, _FROM_INIT))


def step_state_like(spec: LoopSpec, sample: Batch, init_state: Any, *, jit: bool) -> PyTree:
    """Returns what `make_step_state` does, but with shapes in place of arrays where they will do.

    The init function is only traced, unless its arrays may be elsewhere than on the default device,
    or it reads values and cannot be traced.
    """
    if spec.init_fn is None:
        return jax.tree.map(_shape_of_host, _given(init_state))
    init = _Init.of(spec.init_fn)
    if not jit:
        made, _ = init.unchecked(put(sample.value), put(init.prepare(init_state)))
        return as_state(made, _FROM_INIT)
    prepared = init.prepare(init_state)
    traced, shapes = _trace(spec, init, sample.value, prepared)
    if traced is not None and chooses_devices(traced.jaxpr, (sample.value, prepared)):
        return make_step_state(spec, sample, init_state, jit=jit)
    return shapes


def abstract_step_state(spec: LoopSpec, data: Any, init_state: Any) -> PyTree | None:
    """Returns the first step state with a `jax.ShapeDtypeStruct` in place of each array.

    An init function that cannot be traced runs op by op. Without an init function, this returns
    ``init_state``, or None if the loop alone does not say what the step state is.

    Raises:
        DataError: See `sample_of`.
    """
    if spec.init_fn is None:
        return None if init_state is None else as_state(init_state, "init_state")
    try:
        sample = sample_of(data)
        init = _Init.of(spec.init_fn)
        return _trace(spec, init, sample.value, init.prepare(init_state))[1]
    except Exception as error:
        if data is None:
            error.add_note("jaxloop: the init function got no batch; if it needs one, pass data=")
        raise


def _trace(spec: LoopSpec, init: _Init, batch: PyTree, prepared: PyTree) -> tuple[Any, PyTree]:
    """Returns the traced init function, and the shapes of the step state.

    A function that cannot be traced runs op by op, and None is in place of its trace. A run that
    starts afresh after all uses the trace.
    """
    try:
        traced = spec.programs.init(init.fn, init.init_fn).trace(put(batch), put(prepared))
    except TypeError:  # it reads values, or takes some that are no arrays
        return None, as_state(init.unchecked(batch, prepared)[0], _FROM_INIT)
    made, _ = traced.out_info
    return traced, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made)


def _given(init_state: Any) -> PyTree:
    return state_leaves({} if init_state is None else init_state, "run(init_state=)")


def _shape_of_host(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


@dataclasses.dataclass(frozen=True)
class _Init:
    """An init function of either kind; see `PreparedInit`.

    Attributes:
        fn: The function.
        prepare: Converts what the user passed to `run`.
        check: Checks the evidence.
        has_evidence: Whether ``fn`` returns evidence too.
    """

    fn: Callable[..., Any]
    prepare: Callable[[Any], PyTree]
    check: Callable[[PyTree], None]
    has_evidence: bool

    @classmethod
    def of(cls, init_fn: Callable[..., Any]) -> _Init:
        """Returns the parts of an init function."""
        if isinstance(init_fn, PreparedInit):
            return cls(init_fn.fn, init_fn.prepare, init_fn.check, has_evidence=True)
        return cls(init_fn, lambda given: given, lambda evidence: None, has_evidence=False)

    def unchecked(self, batch: PyTree, prepared: PyTree) -> tuple[PyTree, PyTree]:
        """Returns ``(step state, evidence)``. The leaves of the state may be of any type."""
        made = self.fn(batch, prepared)
        return made if self.has_evidence else (split_emission(made)[0], None)

    def init_fn(self, batch: PyTree, prepared: PyTree) -> tuple[PyTree, PyTree]:
        """Returns ``(step state, evidence)``, to be compiled.

        The arrays are copies, so that no two outputs and no output and argument share a buffer.
        """
        state, evidence = self.unchecked(batch, prepared)
        return jax.tree.map(jnp.copy, state_leaves(state, _FROM_INIT)), evidence
