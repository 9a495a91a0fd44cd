"""Functions of the state for `Loop.write`: histograms, and predictions for some examples.

    loop = loop.write(tensorboard("runs/a"), every=100, values=histograms())
    loop = loop.write(tensorboard("runs/a"), values=predictions(model, batch, draw))

Invariant: what is computed from the state of a step depends on that state alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxloop._core.checks import check_callable, check_count
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop._supervised.fields import Field, InputFields
from jaxloop._supervised.models import ModelLike
from jaxloop._supervised.steps import make_evaluation
from jaxloop.errors import ArgumentError
from jaxloop.writers._values import Histogram, join

ValuesFn: TypeAlias = Callable[[State[Any]], Mapping[str, Any]]
"""Makes values for a writer from the state."""

DrawFn: TypeAlias = Callable[[PyTree, PyTree], Mapping[str, Any]]
"""Makes images and texts from a batch and its predictions."""


def histograms(
    parameters: bool | Callable[[Any], PyTree] = True,
    *,
    gradients: bool = False,
    bins: int = 64,
) -> ValuesFn:
    """Returns a function that computes histograms of parameters and gradients, for `Loop.write`.

    The device counts, and only the counts come to the host. Values that are not finite do not
    count. There is one histogram per array, such as ``parameters/Dense_0/kernel``.

    Args:
        parameters: Whether to count the parameters of the trainer's model, or a function of the
            step state that returns the arrays to count.
        gradients: Whether to count the gradients. The trainer must report them:
            ``jl.trainer(..., report=["gradients"])``.
        bins: The number of bins, between the smallest and the largest value.

    Returns:
        ``state -> {name: Histogram}``. If a run resumes right before the end of an epoch, the row
        of that epoch has no gradients, because a checkpoint does not hold them.

    Raises:
        ArgumentError: ``bins`` is less than 1. Raised by `run` if the step state has no model
            state, or the step does not report gradients.

    Example:
        >>> import numpy as np
        >>> import jaxloop as jl
        >>> fn = histograms(lambda step_state: {"w": step_state}, bins=2)
        >>> state = jl.loop(lambda batch, w: w + batch).run([1.0], np.array([0.0, 1.0, 1.0]))
        >>> [(name, one.counts.tolist()) for name, one in fn(state).items()]
        [('parameters/w', [1, 2])]
    """
    check_count("bins", bins, at_least=1, where="histograms")
    # One call per array, because arrays of the same shape share what is compiled.
    count = jax.jit(functools.partial(_count, bins=int(bins)))

    def values(state: State[Any]) -> dict[str, Histogram]:
        trees: dict[str, PyTree] = {}
        if callable(parameters):
            trees["parameters"] = parameters(state.step_state)
        elif parameters:
            trees["parameters"] = _parameters(state.step_state)
        if gradients and (state.outputs or not state.step):
            trees["gradients"] = _gradients(state.outputs)
        arrays = {
            name: array
            for kind, tree in trees.items()
            for name, array in _named(kind, tree).items()
            if jnp.issubdtype(jnp.result_type(array), jnp.floating) and jnp.size(array)
        }
        return {name: Histogram(*count(array)) for name, array in arrays.items()}

    return values


def predictions(
    model: ModelLike,
    batch: PyTree,
    draw: DrawFn,
    *,
    inputs: InputFields = None,
    targets: Field = None,
    weights: Field = None,
    rngs: Sequence[str] = (),
) -> ValuesFn:
    """Returns a function that shows predictions for some examples, for `Loop.write`.

    Args:
        model: The model of the trainer. It predicts in evaluation mode.
        batch: The examples, a batch as the trainer gets it.
        draw: ``(batch, predictions) -> {name: value}`` makes `Image` and `Text` from the batch and
            its predictions, which are NumPy arrays.
        inputs: See `jaxloop.trainer`.
        targets: See `jaxloop.trainer`.
        weights: See `jaxloop.trainer`.
        rngs: See `jaxloop.trainer`.

    Returns:
        ``state -> {name: value}``.

    Raises:
        ModelError: The model is of an unknown kind.
        ArgumentTypeError: ``draw`` is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxloop as jl
        >>> model = (lambda key, x: jnp.zeros((1, 1)), lambda w, x: x @ w)
        >>> batch = (jnp.ones((2, 1)), jnp.ones((2, 1)))
        >>> draw = lambda batch, y: {"first": jl.writers.Text(f"{y[0, 0]:.1f}")}
        >>> fn = predictions(model, batch, draw)
        >>> state = jl.trainer(model, "mean_squared_error", "sgd", log=0).final_state([batch])
        >>> fn(state)
        {'first': Text(text='0.0')}
    """
    check_callable("predictions", "draw", draw)
    made = make_evaluation(model, None, inputs=inputs, targets=targets, weights=weights, rngs=rngs)

    @jax.jit
    def predict(batch: PyTree, model_state: PyTree) -> PyTree:
        return made.step_fn(batch, {"model_state": model_state}).outputs["y_pred"]

    def values(state: State[Any]) -> Mapping[str, Any]:
        model_state = _model_state(state.step_state, "predictions", "use the model of a trainer")
        return draw(*jax.device_get((batch, predict(batch, model_state))))

    return values


def _model_state(step_state: PyTree, where: str, fix: str) -> PyTree:
    if isinstance(step_state, Mapping) and "model_state" in step_state:
        return step_state["model_state"]
    raise ArgumentError(
        f"{where}: the step state must have a `model_state`, as that of a trainer has, got "
        f"{type(step_state).__name__}",
        fix=fix,
    )


def _parameters(step_state: PyTree) -> PyTree:
    fix = "pass a function, such as parameters=lambda step_state: step_state.params"
    model_state = _model_state(step_state, "histograms", fix)
    # Linen's variables: the statistics of a batch normalization are no parameters.
    is_linen = isinstance(model_state, Mapping) and "params" in model_state
    return model_state["params"] if is_linen else model_state


def _gradients(outputs: PyTree) -> PyTree:
    if isinstance(outputs, Mapping) and "gradients" in outputs:
        return outputs["gradients"]
    raise ArgumentError(
        "histograms: the step must report `gradients`, got a step that does not",
        fix="pass report=['gradients'] to jl.trainer, or leave out gradients=True",
    )


def _named(kind: str, tree: PyTree) -> dict[str, Any]:
    """Returns the arrays of a tree by name."""
    named = {join(kind, path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    if named and all(name.endswith("/value") for name in named):  # NNX wraps each array
        return {name.removesuffix("/value"): x for name, x in named.items()}
    return named


def _count(array: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    """Returns the counts and the edges of a histogram of the finite values."""
    x = jnp.asarray(array)
    x = x.ravel().astype(jnp.float32 if jnp.finfo(x.dtype).bits < 32 else x.dtype)
    finite = jnp.isfinite(x)
    low = jnp.min(x, initial=jnp.inf, where=finite)
    high = jnp.max(x, initial=-jnp.inf, where=finite)
    # Without a finite value, or with a single one, the histogram is one wide.
    low, high = (jnp.where(finite.any(), edge, jnp.zeros_like(edge)) for edge in (low, high))
    low, high = jnp.where(high > low, low, low - 0.5), jnp.where(high > low, high, high + 0.5)
    # The difference of two large numbers would overflow, and the inverse of one would be 0 in XLA.
    unit = jnp.where(jnp.maximum(high, -low) > 2.0**90, 2.0**-60, 1.0).astype(x.dtype)
    place = (x * unit - low * unit) / (high * unit - low * unit) * bins
    index = jnp.clip(jnp.where(jnp.isfinite(place), place, 0), 0, bins - 1).astype(jnp.int32)
    counts = jnp.zeros(bins, jnp.int32).at[index].add(finite.astype(jnp.int32))
    share = jnp.linspace(0, 1, bins + 1, dtype=x.dtype)
    return counts, low * (1 - share) + high * share
