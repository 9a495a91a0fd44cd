"""The first step state of a loop, and its shapes, from a sample of the data.

    step_state = make_step_state(spec, sample, init_state, jit=True)
    like = abstract_step_state(spec, data, init_state)

The second compiles nothing, and consumes no batch.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxloop._core.arrays import as_state, copy, put
from jaxloop._core.batch import Batch
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
    init_fn = spec.init_fn
    if init_fn is None:
        return copy(as_state({} if init_state is None else init_state, "run(init_state=)"))
    if isinstance(init_fn, PreparedInit):
        init = spec.programs.init(init_fn.fn, jit=jit)
        prepared = init_fn.prepare(init_state)
        state, evidence = init(put(sample.value), put(prepared))
        init_fn.check(evidence)
    else:
        init = spec.programs.init(init_fn, jit=jit)
        state, _ = split_emission(init(put(sample.value), put(init_state)))
    return copy(as_state(state, _FROM_INIT))


def abstract_step_state(spec: LoopSpec, data: Any, init_state: Any) -> PyTree | None:
    """Returns the first step state with a `jax.ShapeDtypeStruct` in place of each array.

    An init function that cannot be traced runs op by op. Without an init function, this returns
    ``init_state``, or None if the loop alone does not say what the step state is.

    Raises:
        DataError: See `sample_of`.
    """
    init_fn = spec.init_fn
    if init_fn is None:
        return None if init_state is None else as_state(init_state, "init_state")
    try:
        sample = sample_of(data)
        prepared = init_fn.prepare(init_state) if isinstance(init_fn, PreparedInit) else None

        def make() -> PyTree:
            if isinstance(init_fn, PreparedInit):
                state, _ = init_fn.fn(sample.value, prepared)
            else:
                state, _ = split_emission(init_fn(sample.value, init_state))
            return as_state(state, _FROM_INIT)

        try:
            return jax.eval_shape(make)
        except jax.errors.JAXTypeError:  # it reads values, as a loop with jit=False may
            return make()
    except Exception as error:
        if data is None:
            error.add_note("jaxloop: the init function got no batch; if it needs one, pass data=")
        raise
