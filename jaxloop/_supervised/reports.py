"""What a training step can report besides its loss: norms, gradients, updates, the learning rate.

    check_report(("gradient_norm",))
    values = reported(("gradient_norm",), Update(grads, updates, params, optimizer_state, scale))

Invariant: what is not named is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from jaxloop._core.arrays import at_least_float32
from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentError, ArgumentTypeError, unknown_name

Report: TypeAlias = Literal[
    "gradient_norm", "update_norm", "parameter_norm", "learning_rate", "gradients", "updates"
]
"""A value that a training step can report."""


class Update(NamedTuple):
    """An update of the parameters.

    Attributes:
        gradients: The gradients of the loss, before the optimizer clips or changes them.
        updates: What was added to the parameters.
        params: The parameters after the update.
        optimizer_state: The optimizer's state after the update.
        scale: The scale of the learning rate.
    """

    gradients: PyTree
    updates: PyTree
    params: PyTree
    optimizer_state: PyTree
    scale: jax.Array


def check_report(report: Sequence[str]) -> tuple[str, ...]:
    """Returns the names as a tuple, and raises if one is unknown.

    Raises:
        UnknownNameError: A name is unknown.
        ArgumentTypeError: ``report`` is not a sequence of names.
    """
    if isinstance(report, str) or not isinstance(report, Sequence):
        raise ArgumentTypeError(
            f"report must be a tuple of names, got {report!r}",
            fix="pass names, such as report=('gradient_norm',)",
        )
    for name in report:
        if name not in _VALUES:
            raise unknown_name("report", name, get_args(Report))
    return tuple(dict.fromkeys(report))


def reported(names: Sequence[str], update: Update) -> dict[str, PyTree]:
    """Returns the named values of an update.

    Raises:
        ArgumentError: The learning rate is named, and the optimizer's state does not hold it.
    """
    return {name: _VALUES[name](update) for name in names}


def _norm(tree: PyTree) -> jax.Array:
    # In float32 or wider, because the squares of half-precision numbers overflow.
    wide = jax.tree.map(at_least_float32, tree)
    return jnp.asarray(optax.tree.norm(wide))


def _learning_rate(update: Update) -> jax.Array:
    try:
        # The state of a schedule has the same name as the rate that it gave.
        rate = optax.tree.get(
            update.optimizer_state,
            "learning_rate",
            filtering=lambda path, value: isinstance(value, jax.Array | float),
        )
    except KeyError as error:
        raise ArgumentError(
            "report='learning_rate' needs an optimizer with one learning rate, got several in its "
            "state",
            fix="leave it out, and report the one that you mean from your own step",
        ) from error
    if rate is None:
        raise ArgumentError(
            "report='learning_rate' needs an optimizer whose state holds its learning rate, got "
            "one without",
            fix="wrap the optimizer, as in optax.inject_hyperparams(optax.adam)(learning_rate=...)",
        )
    rate = jnp.asarray(rate)
    return rate * update.scale.astype(rate.dtype)


_VALUES: dict[str, Callable[[Update], Any]] = {
    "gradient_norm": lambda update: _norm(update.gradients),
    "update_norm": lambda update: _norm(update.updates),
    "parameter_norm": lambda update: _norm(update.params),
    "learning_rate": _learning_rate,
    "gradients": lambda update: update.gradients,
    "updates": lambda update: update.updates,
}
