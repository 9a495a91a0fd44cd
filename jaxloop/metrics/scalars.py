"""The metrics of all scalars that a step reports, one for each.

    loop = loop.replace(metrics=(EACH_SCALAR,))
    specs = of_each_scalar(EACH_SCALAR, inputs, {"accuracy"})   # loss, aux/kl, ... but not accuracy

Invariant: a scalar is the mean of its batch, so its average over an epoch is weighted by the number
of examples of each batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, Final

import jax
import jax.numpy as jnp

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.metrics.declare import BatchMean, EachScalar, MetricSpec
from jaxloop.metrics.inputs import Inputs

EACH_SCALAR: Final = MetricSpec("each scalar", EachScalar(), "running_average")
"""The declaration of the metrics of all scalars."""


def of_each_scalar(spec: MetricSpec, inputs: Inputs, taken: Collection[str]) -> list[MetricSpec]:
    """Returns one metric for each real number that the step reports as a scalar, by its path.

    Args:
        spec: The declaration of all of them.
        inputs: What the step reports, or its shapes.
        taken: The names of other metrics, and of outputs that have another meaning.
    """
    specs = []
    # Value by value, because JAX sorts the keys of a dict, and not all keys compare.
    for output, value in inputs.reported.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            name = "/".join([str(output), *(_keystr((key,)) for key in path)])
            if name not in taken and _is_real_scalar(leaf):
                fields = functools.partial(_scalar, output, path)
                specs.append(
                    dataclasses.replace(spec, name=name, metric=BatchMean(), fields=fields)
                )
    return specs


def _is_real_scalar(leaf: Any) -> bool:
    if jnp.shape(leaf) != ():
        return False
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
