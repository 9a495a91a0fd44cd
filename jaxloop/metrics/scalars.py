"""The metrics of all scalars that a step reports, one for each.

    loop = loop.replace(metrics=(EACH_SCALAR,))
    specs = of_each_scalar(EACH_SCALAR, inputs, {"accuracy"})   # loss, aux/kl, ... but not accuracy

Invariant: a scalar is the mean of its batch, so its average over an epoch is weighted by the number
of examples of each batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Set
from typing import Any, Final

import jax
import jax.numpy as jnp

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.metrics.declare import BatchMean, EachScalar, MetricSpec
from jaxloop.metrics.inputs import Inputs
from jaxloop.metrics.names import resolved

EACH_SCALAR: Final = MetricSpec("each scalar", EachScalar(), "running_average")
"""The declaration of the metrics of all scalars."""

EACH_VALUE: Final = MetricSpec("each value", EachScalar(per_example=True), "running_average")
"""The declaration of the metrics of all scalars, and of all values with one number per example."""

_NOT_VALUES = frozenset({"y_true", "y_pred"})


def of_each_scalar(spec: MetricSpec, inputs: Inputs, taken: Set[str]) -> list[MetricSpec]:
    """Returns one metric for each real number that the step reports as a scalar, by its path.

    Args:
        spec: The declaration of all of them.
        inputs: What the step reports, or its shapes.
        taken: The names of other metrics, and of outputs that have another meaning.
    """
    assert isinstance(spec.metric, EachScalar)
    specs = []
    # Value by value, because JAX sorts the keys of a dict, and not all keys compare.
    for output, value in inputs.reported.items():
        if (
            spec.metric.per_example
            and output not in taken | _NOT_VALUES
            and _is_vector(value, inputs)
        ):
            specs.append(resolved(MetricSpec(output, output), inputs))
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            name = "/".join([str(output), *(_keystr((key,)) for key in path)])
            if name not in taken and _is_real_scalar(leaf):
                fields = functools.partial(_scalar, output, path)
                specs.append(
                    dataclasses.replace(spec, name=name, metric=BatchMean(), fields=fields)
                )
    return specs


def _is_vector(value: Any, inputs: Inputs) -> bool:
    """Returns whether a value has one real number per example, or per element with a weight."""
    if not hasattr(value, "shape") or not value.shape or not _is_real(value):
        return False
    weight = inputs.reported.get("sample_weight")
    return len(value.shape) == 1 if weight is None else value.shape == jnp.shape(weight)


def _is_real_scalar(leaf: Any) -> bool:
    return jnp.shape(leaf) == () and _is_real(leaf)


def _is_real(leaf: Any) -> bool:
    dtype = jnp.result_type(leaf)
    return dtype == jnp.bool_ or any(
        jax.dtypes.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating)
    )


def _scalar(output: Any, path: Any, named: dict[str, PyTree]) -> list[PyTree]:
    """Returns the scalar of one path, as the argument of its metric."""
    for other, leaf in jax.tree_util.tree_leaves_with_path(named.get(output)):
        if other == path:
            return [leaf]
    raise errors.ShapeError(
        f"the step must report the same scalars for every batch, got none at "
        f"{output}{jax.tree_util.keystr(path)} for another batch",
        fix="report the same values for batches of any shape",
    )


def _keystr(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
