"""The factory of loops from training steps that exist already.

    loop = from_train_step(train_step, eval_step=eval_step).validate(validation_data)
    state = loop.run(train_data, TrainState.create(...), epochs=3).step_state

Invariant: the step is called as it is written, and what it gets and returns are the user's own
objects. Only pure pytrees are carried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxloop._adopted.carried import Carried
from jaxloop._adopted.step import AdoptedEvalStep, AdoptedStep
from jaxloop._adopted.transforms import unwrapped
from jaxloop._core.checks import check_callable
from jaxloop._core.state import State, shown_as
from jaxloop._core.types import PyTree
from jaxloop._loop import Loop
from jaxloop.handlers.evaluation import StepTask
from jaxloop.metrics.scalars import EACH_SCALAR


def from_train_step(
    train_step: Callable[..., Any],
    *,
    eval_step: Callable[..., Any] | None = None,
    key: Any = None,
) -> Loop[Any, State[Any]]:
    """Makes a loop from a training step in Flax's convention.

    Pass the first state to `run`: ``loop.run(data, state)``. It is a Flax ``TrainState``, any other
    pytree, or a tuple of NNX modules such as ``(model, optimizer)``. It is not changed. The final
    `State` has the trained state as its ``step_state``, for NNX as new modules.

    Args:
        train_step: ``train_step(state, batch)`` returns the new state, or ``(state, metrics)``. It
            may be compiled already. What has the structure of the state is the state. The metrics
            are a dict, a named tuple or a dataclass, whose fields are reported, or a scalar, which
            is reported as ``loss``. Each reported scalar becomes a metric of its name, averaged
            over the examples of an epoch. For NNX, it may also be ``train_step(model, optimizer,
            batch)``, which changes its modules in place and returns only the metrics, or nothing.
            An `nnx.MultiMetric` is carried from epoch to epoch, so its values are not those of an
            epoch.
        eval_step: ``eval_step(state, batch)`` returns metrics, in the same conventions.
            `Loop.validate` then needs only data.
        key: A `jax.random.key` or a seed. The step then gets a key as its third argument (after the
            batch), a new one each time. A resumed run continues with the keys that come next.

    Returns:
        A loop whose `run` and `final_state` return the final `State`. In handlers,
        ``state.step_state`` is what is carried: the pytree itself, or the variables of the NNX
        modules; with ``key=``, a dict with this as ``state``. ``loop.output(state)`` converts it,
        also in a restored state.

    Raises:
        ArgumentTypeError: A step is not a function, ``key`` is neither a key nor a seed, or the
            step is under `jax.pmap`. Raised by `run` without a state, or if the step returns
            something else.
        StructureError: Raised by `run` if the step changes the structure, a shape or a dtype of the
            state, or creates an NNX variable.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxloop as jl
        >>> def train_step(w, batch):
        ...     loss, gradient = jax.value_and_grad(lambda w: jnp.mean((batch - w) ** 2))(w)
        ...     return w - 0.25 * gradient, {"loss": loss}
        >>> state = jl.from_train_step(train_step).run([jnp.ones(4)], 0.0, epochs=2)
        >>> float(state.step_state), float(state.history[1]["loss"])
        (0.75, 0.25)
    """
    check_callable("from_train_step", "train_step", train_step)
    carried = Carried.of(key)
    step = AdoptedStep(unwrapped("train_step", train_step), carried)
    task = None
    if eval_step is not None:
        check_callable("from_train_step", "eval_step", eval_step)
        task = StepTask(AdoptedEvalStep(unwrapped("eval_step", eval_step), carried))

    def output(state: State[PyTree]) -> State[PyTree]:
        return shown_as(state, carried.show)

    return Loop(step, carried, output, metrics=(EACH_SCALAR,), task=task, show=carried.show)
