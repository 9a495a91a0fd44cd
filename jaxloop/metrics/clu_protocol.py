"""Metric classes with the CLU protocol (from clu or metrax), as metrics that can start empty.

    keywords = model_output(cls, outputs, args, weight, "name")
    instance = from_output(cls, keywords)
    metric = clu_metric(cls, jax.eval_shape(from_output, cls, keywords), "name")

Invariant: clu and metrax are never imported. jaxloop reads the signature of
``from_model_output`` and passes only the keywords that it declares, because metrax's methods accept
no others. A mask is always boolean, and weights go only to a class that takes weights. Floats of
half precision are passed as float32, because a class sums them in their own dtype.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.metrics.accumulators import cast_like
from jaxloop.metrics.metric import Metric

_TRUE_NAMES = ("y_true", "labels", "targets")
_PRED_NAMES = ("y_pred", "logits", "predictions")
_MASK_NAME = "mask"
_WEIGHT_NAMES = ("sample_weight", "sample_weights", "weights")


class CluMetric(Protocol):
    """A metric class with the protocol of `clu.metrics.Metric`; its instances are pytrees."""

    @classmethod
    def from_model_output(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes the metric of one batch."""

    def merge(self, other: Any) -> Any:
        """Combines two metrics into one."""

    def compute(self) -> Any:
        """Returns the value."""


def model_output(
    cls: type[CluMetric],
    outputs: Mapping[str, PyTree],
    args: tuple[PyTree, ...] | None,
    weight: ArrayLike | None,
    name: str,
) -> dict[str, PyTree]:
    """Collects the keywords for ``cls.from_model_output``.

    Args:
        cls: The class.
        outputs: The outputs that the step reported.
        args: ``(y_true, y_pred)`` if the user named fields. If None, both come from ``outputs``.
        weight: ``(batch,)`` or None.
        name: The name of the metric, for the error message.

    Returns:
        The outputs by name, and the targets, predictions and weights under all their usual names.
        Only keywords that ``from_model_output`` takes are included. Rows of weight 0 hold no NaN.

    Raises:
        ArgumentError: A keyword is missing. The message lists the ones that exist.
        ShapeError: The batch has weights, and the class takes none.
    """
    known = dict(outputs)
    known.pop("sample_weight", None)
    pair = args if args is not None else (outputs.get("y_true"), outputs.get("y_pred"))
    for position, names in ((0, _TRUE_NAMES), (1, _PRED_NAMES)):
        if len(pair) > position and pair[position] is not None:
            for alias in names:
                if args is not None or alias not in known:
                    known[alias] = pair[position]
    known = jax.tree.map(_widened, known)
    if weight is not None:
        weights = jnp.asarray(weight)
        present = weights.astype(jnp.bool_)
        known = {key: _without_absent(key, value, present) for key, value in known.items()}
        known.update(dict.fromkeys(_WEIGHT_NAMES, weights))
        known[_MASK_NAME] = present
    parameters = inspect.signature(cls.from_model_output).parameters.values()
    taken = {p.name for p in parameters}
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    missing = [p for p in required if p not in known]
    if missing:
        raise errors.ArgumentError(
            f"metric {name!r}: {cls.__name__}.from_model_output needs {', '.join(missing)}, got "
            f"{', '.join(sorted(known)) or 'nothing'}",
            fix="report it from the step with jl.emit",
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return known
    if weight is not None and not taken & {_MASK_NAME, *_WEIGHT_NAMES}:
        raise _takes_none(cls, name)
    return {key: value for key, value in known.items() if key in taken}


def check_weights(
    cls: type[CluMetric], keywords: dict[str, PyTree], dtype: DTypeLike, name: str
) -> None:
    """Checks that a class reads the weights of a batch, and does not take weights for a mask.

    Args:
        cls: The class.
        keywords: The result of `model_output`, or its shapes.
        dtype: The dtype of the weights.
        name: The name of the metric, for the error message.

    Raises:
        ShapeError: The class reads neither a mask nor weights.
        ArgumentTypeError: The class only reads a mask, and the weights are numbers.
    """
    # A class may take any keyword and read few, so only its program shows what it reads.
    program = jax.make_jaxpr(functools.partial(from_output, cls))(keywords).jaxpr
    used = {id(v) for eqn in program.eqns for v in eqn.invars} | {id(v) for v in program.outvars}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(keywords)]
    read = {
        path[0].key
        for path, variable in zip(paths, program.invars, strict=True)
        if id(variable) in used
    }
    if not read & {_MASK_NAME, *_WEIGHT_NAMES}:
        raise _takes_none(cls, name)
    if dtype != jnp.bool_ and not read & set(_WEIGHT_NAMES):
        raise errors.ArgumentTypeError(
            f"metric {name!r}: the weights must be a boolean mask, because "
            f"{cls.__name__}.from_model_output takes no weights, got {dtype}",
            fix="report sample_weight as bool if it is a mask, or use a metric that takes weights",
        )


def _takes_none(cls: type[CluMetric], name: str) -> errors.ShapeError:
    # Without the weights, the padding of a batch would count as examples.
    return errors.ShapeError(
        f"metric {name!r}: {cls.__name__}.from_model_output takes none of the arguments "
        f"{', '.join((_MASK_NAME, *_WEIGHT_NAMES))}, got a batch with sample weights or a mask",
        fix="use a metric that takes a mask, or drop_remainder=True instead of pad=True",
    )


def _widened(value: ArrayLike) -> jax.Array:
    array = jnp.asarray(value)
    half = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    return array.astype(jnp.float32) if half else array


def _without_absent(key: str, value: PyTree, present: jax.Array) -> PyTree:
    """Replaces what a class could not weight by 0, because 0 * NaN is NaN."""
    num = present.shape[0]
    # An example that is present is one that the class can compute, unlike zeros inside a log.
    first = jnp.argmax(present).astype(jnp.int32) if num else jnp.int32(0)
    row = jnp.where(present, jnp.arange(num, dtype=jnp.int32), first)

    def one(array: jax.Array) -> jax.Array:
        if array.ndim == 0 or array.shape[0] != num:
            return array
        if key in _TRUE_NAMES + _PRED_NAMES:
            return jnp.take(array, row, axis=0)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        # Another output may have a first axis of this length by chance, so its numbers stay.
        shaped = present.reshape(present.shape + (1,) * (array.ndim - 1))
        return jnp.where(shaped | jnp.isfinite(array), array, jnp.zeros((), array.dtype))

    return jax.tree.map(one, value)


def from_output(cls: type[CluMetric], keywords: dict[str, PyTree]) -> PyTree:
    """Returns ``cls.from_model_output(**keywords)`` with arrays as leaves."""
    # These classes are written for JAX's standard promotion, even if the user forbids it elsewhere.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.tree.map(jnp.asarray, cls.from_model_output(**keywords))


def merge(a: PyTree, b: PyTree) -> PyTree:
    """Returns ``a.merge(b)``."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return a.merge(b)


def compute(instance: PyTree) -> PyTree:
    """Returns ``instance.compute()``."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return instance.compute()


def clu_metric(cls: type[CluMetric], shapes: PyTree, name: str) -> Metric:
    """Makes a `Metric` from a class with the CLU protocol.

    The protocol has no empty metric, so the accumulator records whether it has seen a batch.

    Args:
        cls: The class.
        shapes: An instance with `jax.ShapeDtypeStruct` as leaves.
        name: The name of the metric, for the error messages.

    Returns:
        A metric with ``update(acc, keywords, weight=present)``. ``keywords`` come from
        `model_output`, and ``present`` says whether the batch has an example of nonzero weight.

    Raises:
        ShapeError: Merging two instances gives other shapes.
    """
    twice = jax.eval_shape(merge, shapes, shapes)
    # Leaf by leaf, because the class may have no `==`.
    if [x.shape for x in jax.tree.leaves(shapes)] != [x.shape for x in jax.tree.leaves(twice)]:
        raise errors.ShapeError(
            f"metric {name!r}: the state of {cls.__name__} must have a fixed shape, got one that "
            "grows in merge and so cannot be carried through a compiled loop",
            fix="use a metric whose state has a fixed shape",
        )

    def choose(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
        return jax.tree.map(lambda x, y: jnp.where(condition, x.astype(y.dtype), y), a, b)

    def init() -> PyTree:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return {"state": zeros, "seen": jnp.zeros((), jnp.bool_)}

    def update(acc: PyTree, keywords: dict[str, PyTree], weight: jax.Array) -> PyTree:
        state = cast_like(name, from_output(cls, keywords), acc["state"])
        return merge_seen(acc, {"state": state, "seen": weight})

    def merge_seen(a: PyTree, b: PyTree) -> PyTree:
        both = cast_like(name, merge(a["state"], b["state"]), a["state"])
        one = choose(a["seen"], a["state"], b["state"])
        return {
            "state": choose(a["seen"] & b["seen"], both, one),
            "seen": a["seen"] | b["seen"],
        }

    def compute_seen(acc: PyTree) -> PyTree:
        value = jax.tree.map(jnp.asarray, compute(acc["state"]))
        return jax.tree.map(
            lambda x: (
                jnp.where(acc["seen"], x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x
            ),
            value,
        )

    return Metric(init, update, merge_seen, compute_seen, name)
