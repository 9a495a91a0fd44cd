"""What the accumulators of a loop mean, in a form that a saved state can hold.

    meanings = meanings_of(specs, jax.eval_shape(metrics.init))
    changes = differences(saved, meanings)      # ["'loss' is missing there", ...]

Accumulators of two different metrics may have the same shapes, so shapes alone do not tell whether
a run may add to the accumulators of an earlier one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import jax

from jaxloop._core.fingerprint import stable
from jaxloop._core.types import PyTree
from jaxloop.metrics.declare import EachScalar, MetricSpec
from jaxloop.metrics.names import names_of_value

Meanings = dict[str, dict[str, str]]
"""For each metric by name, its ``kind`` and the ``leaves`` of its accumulator."""


def meanings_of(specs: Iterable[MetricSpec], accumulators: Mapping[str, PyTree]) -> Meanings:
    """Returns what each accumulator means.

    Args:
        specs: The declared metrics. If two have the same name, the last one counts.
        accumulators: The accumulators, or their shapes.
    """
    last = {spec.name: spec for spec in specs}
    meanings = {
        name: {"kind": kind_of(spec), "leaves": _leaves(accumulators[name])}
        for name, spec in last.items()
        if name in accumulators
    }
    for name, spec in last.items():
        if isinstance(spec.metric, EachScalar):
            # All scalars accumulate in the same way, so their names and dtypes are enough.
            scalars = [
                f"{scalar} {jax.tree.leaves(one)[0].dtype}"
                for scalar, one in accumulators.items()
                if not any(declared in last for declared in names_of_value(scalar))
            ]
            meanings[name] = {"kind": kind_of(spec), "leaves": ", ".join(scalars)}
    return meanings


def kind_of(spec: MetricSpec) -> str:
    """Describes a metric without its name, in the same way in every process.

    Example:
        >>> from jaxloop.metrics.declare import declare
        >>> kind_of(declare("accuracy")), kind_of(declare("accuracy", accumulate="last"))
        ("'accuracy'", "'accuracy', accumulate='last'")
    """
    parts = [stable(spec.metric)]
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name not in ("name", "metric") and value != field.default:
            parts.append(f"{field.name}={stable(value)}")
    return ", ".join(parts)


def _leaves(accumulator: PyTree) -> str:
    return ", ".join(
        f"{jax.tree_util.keystr(path, simple=True, separator='.')} {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(accumulator)
    )
