"""Derived metrics: values computed on the host from the values of other metrics.

    perplexity = declare_derived("perplexity", np.exp, "loss")
    derived = in_order([perplexity], ["loss"])
    values = with_derived(derived, {"loss": np.float32(2.0)})

Invariant: a derived metric has no accumulator, and nothing of it is compiled. It is a function of
the values at one moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.metrics.declare import Derived, MetricSpec


def declare_derived(name: str, fn: Callable[..., PyTree], of: str | Sequence[str]) -> MetricSpec:
    """Declares a metric that is computed from the values of others.

    Args:
        name: Its key in the results.
        fn: Returns the value. It gets the values of ``of`` as NumPy values, in that order.
        of: The names of the other metrics.

    Raises:
        ArgumentTypeError: An argument has the wrong type.

    Example:
        >>> declare_derived("perplexity", np.exp, "loss").metric.of
        ('loss',)
    """
    if not isinstance(name, str) or not name:
        raise errors.ArgumentTypeError(
            f"derive: name must be a nonempty string, got {name!r}",
            fix="pass a name such as 'perplexity'",
        )
    if not callable(fn):
        raise errors.ArgumentTypeError(
            f"derive: fn must be a function of the values of other metrics, got {fn!r:.80}",
            fix="pass a function such as jnp.exp",
        )
    names = (of,) if isinstance(of, str) else of
    are_names = isinstance(names, tuple | list) and all(isinstance(one, str) for one in names)
    if not are_names or not names:
        raise errors.ArgumentTypeError(
            f"derive: of must be the name of a metric or a tuple of names, got {of!r}",
            fix="pass names such as of=('precision', 'recall')",
        )
    return MetricSpec(name, Derived(fn, tuple(names)))


def in_order(specs: Iterable[MetricSpec], names: Iterable[str]) -> tuple[tuple[str, Derived], ...]:
    """Returns derived metrics by name in an order in which each comes after those that it reads.

    Args:
        specs: The declared metrics, of which the ones that are not derived are ignored.
        names: The names of the accumulated metrics.

    Raises:
        UnknownNameError: A metric is derived from one that does not exist.
        ArgumentError: Metrics are derived from each other.
    """
    known = dict.fromkeys(names)
    pending = {spec.name: spec.metric for spec in specs if isinstance(spec.metric, Derived)}
    ordered: list[tuple[str, Derived]] = []
    while pending:
        ready = [n for n, one in pending.items() if all(read in known for read in one.of)]
        for name in ready:
            ordered.append((name, pending.pop(name)))
            known[name] = None
        if not ready:
            raise _cannot_derive(pending, known)
    return tuple(ordered)


def _cannot_derive(pending: Mapping[str, Derived], known: Iterable[str]) -> errors.JaxloopError:
    existing = [*known, *pending]
    for name, one in pending.items():
        for read in one.of:
            if read not in existing:
                others = [other for other in existing if other != name]
                return errors.unknown_name(f"metric of the derived metric {name!r}:", read, others)
    return errors.ArgumentError(
        f"metrics must not be derived from each other, got {', '.join(map(repr, pending))}",
        fix="derive each of them from other metrics",
    )


def with_derived(
    derived: Iterable[tuple[str, Derived]], values: dict[str, PyTree]
) -> dict[str, PyTree]:
    """Returns values of metrics on the host together with the derived ones.

    Raises:
        ArgumentTypeError: A function returns something else than numbers.
        Exception: A function raised. A note names its metric.
    """
    values = dict(values)
    for name, one in derived:
        args = [values[read] for read in one.of]
        try:
            # Before the first update, values are NaN or 0.
            with np.errstate(all="ignore"):
                values[name] = _on_host(name, one.fn(*args))
        except Exception as error:
            error.add_note(f"jaxloop: in the derived metric {name!r}")
            raise
    return values


def _on_host(name: str, value: PyTree) -> PyTree:
    """Returns numbers and arrays as NumPy values, in a tree of any structure."""

    def one(leaf: Any) -> Any:
        array = np.asarray(leaf)
        if array.dtype != np.bool_ and not jax.dtypes.issubdtype(array.dtype, np.number):
            raise _not_numbers(name, leaf)
        return array[()]  # a scalar if it has no axis

    if not jax.tree.leaves(value):
        raise _not_numbers(name, value)
    return jax.tree.map(one, value)


def _not_numbers(name: str, value: object) -> errors.ArgumentTypeError:
    return errors.ArgumentTypeError(
        f"the function of the derived metric {name!r} must return numbers, got {value!r:.80}",
        fix="return a number, an array, or a pytree of them",
    )
