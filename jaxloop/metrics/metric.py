"""The `Metric` type: an accumulator and four pure functions.

    metric = mean(lambda y_true, y_pred: (y_true - y_pred) ** 2)
    acc = metric.update(metric.init(), y_true, y_pred, weight=mask)
    value = metric.compute(metric.merge(acc, other_acc))

Invariant: ``merge(init(), a) == a``, ``merge`` is associative, and the value does not depend on how
the data are split into batches: counts are exact, and sums are equal up to rounding. The structure,
shapes and dtypes of an accumulator never depend on the batch. Examples of weight 0 add nothing,
even if their value is NaN.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors, losses
from jaxloop._core.types import Better, PyTree
from jaxloop.metrics.accumulators import strongly_typed
from jaxloop.metrics.exact_int import is_integer, sum_ints, sum_limbs
from jaxloop.metrics.exact_sum import (
    Pair,
    divide_pairs,
    float_dtype,
    pair_of_exact,
    sum_weights,
    zero_pair,
)
from jaxloop.metrics.sums import Examples, is_node, merge_sums, nodes_of, summed
from jaxloop.metrics.weights import check_weight, leading_axis, scalar_with_weights


@dataclass(frozen=True)
class Metric:
    """An accumulator pytree with the four pure functions that work on it.

    Attributes:
        init: ``() -> acc``.
        update: ``(acc, *values, weight=None) -> acc``, with ``weight`` of shape ``(batch,)``. An
            update without the argument ``weight`` works for batches that have no weights and no
            mask, and is an error for others.
        merge: ``(acc, acc) -> acc``.
        compute: ``acc -> value``, a pytree.
        name: The name of the metric if you give no other.
        weighted: The metric to use with float weights, if it is a different one. A count, for
            example, is an exact integer without weights and a float with them.
        better: Which values are better, "min" (the smaller ones) or "max". Monitors and checkpoint
            criteria with ``mode="auto"`` read it. None means that this is unknown.
        delta: ``(*values, weight=None) -> acc``, what a batch adds, for a metric whose accumulator
            is a sum; see `jaxloop.metrics.sums`. A loop then adds the sums of all its metrics at
            once. ``update`` must do the same. The built-in metrics have it, and a loop leaves it
            out if you replace their ``update``.

    Example:
        >>> import jax.numpy as jnp
        >>> largest = Metric(
        ...     init=lambda: jnp.float32(-jnp.inf),
        ...     update=lambda acc, x, weight=None: jnp.maximum(acc, jnp.max(x)),
        ...     merge=jnp.maximum,
        ...     compute=lambda acc: acc,
        ... )
        >>> float(largest.compute(largest.update(largest.init(), jnp.array([1.0, 3.0]))))
        3.0
    """

    init: Callable[[], PyTree]
    update: Callable[..., PyTree]
    merge: Callable[[PyTree, PyTree], PyTree]
    compute: Callable[[PyTree], PyTree]
    name: str = ""
    weighted: Metric | None = None
    better: Better | None = None
    delta: Callable[..., PyTree] | None = None


def of_sums(
    init: Callable[[], PyTree],
    delta: Callable[..., PyTree],
    compute: Callable[[PyTree], PyTree],
    name: str,
    *,
    weighted: Metric | None = None,
    better: Better | None = None,
) -> Metric:
    """Makes a metric whose accumulator is a sum, from what a batch adds to it; see `Metric`."""

    def update(acc: PyTree, *values: PyTree, weight: ArrayLike | None = None) -> PyTree:
        return merge_sums(acc, summed(delta(*values, weight=weight), acc))

    # `dataclasses.replace(metric, update=mine)` keeps the delta, which is then another sum.
    delta.belongs_to = update  # type: ignore[attr-defined]  # a function has any attributes
    return Metric(init, update, merge_sums, compute, name, weighted, better, delta)


def updated(
    metric: Metric, acc: PyTree, args: tuple[PyTree, ...], weight: ArrayLike | None, title: str
) -> PyTree:
    """Returns ``metric.update(acc, *args, weight=weight)``; ``update`` may have no ``weight``.

    Raises:
        ArgumentError: The batch has weights, and ``update`` does not take them.
    """
    return _weighted("update", metric.update, (acc, *args), weight, title)


def delta_of(
    metric: Metric, title: str
) -> Callable[[tuple[PyTree, ...], ArrayLike | None], PyTree] | None:
    """Returns the ``(args, weight) -> delta`` of a metric, or None if it has only an update.

    Raises:
        ArgumentError: The metric has a delta, and its accumulator is no sum.
    """
    delta = metric.delta
    if delta is None or getattr(delta, "belongs_to", metric.update) is not metric.update:
        return None
    for node in nodes_of(jax.eval_shape(lambda: strongly_typed(metric.init())))[0]:
        if not is_node(node) and node.dtype != jnp.bool_:
            raise errors.ArgumentError(
                f"{title}: the accumulator of a metric with a delta must consist of the sums of "
                f"jaxloop.metrics.sums and of bools, got {node.dtype}{list(node.shape)}",
                fix="leave out delta; update alone gives the same value",
            )
    return lambda args, weight: _weighted("delta", delta, args, weight, title)


def _weighted(
    name: str,
    fn: Callable[..., PyTree],
    args: tuple[PyTree, ...],
    weight: ArrayLike | None,
    title: str,
) -> PyTree:
    if _takes_weight(fn):
        return fn(*args, weight=weight)
    if weight is not None:
        # Without the weights, the padding of a batch would count as examples.
        raise errors.ArgumentError(
            f"{title}: {name} must take weight= when the batch has sample weights or a mask, got "
            f"one without it",
            fix=f"give {name} the keyword weight=None, of shape (batch,), and leave out examples "
            "of weight 0",
        )
    return fn(*args)


def _takes_weight(update: Callable[..., PyTree]) -> bool:
    try:
        parameters = inspect.signature(update).parameters.values()
    except ValueError:  # a builtin has no signature
        return True
    return any(p.name == "weight" or p.kind is p.VAR_KEYWORD for p in parameters)


def mean(
    values_fn: Callable[..., ArrayLike], *, name: str = "", better: Better | None = None
) -> Metric:
    """Makes a metric that averages the values of a function over all examples.

    Args:
        values_fn: ``(*values) -> (batch,)`` or ``(batch, *rest)``. The mean runs over all axes. A
            scalar is the mean of its batch, and raises an error if the batch has weights. A loss
            of Optax gets its arguments in its own order.
        name: The name of the metric.
        better: Which values are better; see `Metric`.

    Returns:
        A metric whose value is a float32 scalar (float64 if x64 is enabled), and NaN before the
        first update.

    Example:
        >>> import jax.numpy as jnp
        >>> m = mean(lambda x: x)
        >>> float(m.compute(m.update(m.init(), jnp.array([1.0, 3.0]))))
        2.0
    """

    values_fn = losses.target_first(values_fn)

    def init() -> dict[str, Pair]:
        return {"sum": zero_pair(), "weight": zero_pair()}

    def delta(*values: PyTree, weight: ArrayLike | None = None) -> dict[str, PyTree]:
        result = jnp.asarray(values_fn(*values))
        if result.ndim == 0:
            num = leading_axis(values) or 1
            if weight is not None:
                raise scalar_with_weights(name or "mean")
            result = result[None]
            checked: jax.Array | None = jnp.full((1,), num, jnp.int32)
        else:
            checked = check_weight(weight, result.shape[0], name or "mean")
        if result.ndim > 1:
            result = _trailing_mean(result)
        return {
            "sum": Examples(result, checked),
            "weight": sum_weights(checked, result.shape[0]),
        }

    def compute(acc: dict[str, Pair]) -> jax.Array:
        return divide_pairs(acc["sum"], acc["weight"], jnp.nan)

    return of_sums(init, delta, compute, name, better=better)


def _trailing_mean(values: jax.Array) -> jax.Array:
    """Returns the mean over all axes but the first, as floats."""
    if values.dtype != jnp.bool_ and not is_integer(values.dtype):
        axes = tuple(range(1, values.ndim))
        return jnp.mean(values.astype(float_dtype()), axis=axes)
    flat = values.reshape(values.shape[0], -1)
    total = pair_of_exact(sum_ints(flat.T, None, sum_limbs()))
    return total.hi / flat.shape[1]
