"""The init function of a supervised loop, in three parts of which only one is compiled.

    init_fn = SupervisedInit(make_state, adapter.load, loss)
    prepared = init_fn.prepare(init_state)                    # arrays, before the trace
    state, evidence = jax.jit(init_fn.fn)(batch, prepared)
    init_fn.check(evidence)                                   # raises, after the computation

Invariant: ``prepare`` turns the state that the user passes, such as an NNX module, into a pytree of
arrays, so that ``fn`` can be compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentError
from jaxloop.losses import Loss

Evidence = jax.Array | None
"""Whether the predictions for the first batch can be probabilities; None if they need not be."""


@dataclasses.dataclass(frozen=True)
class SupervisedInit:
    """An init function that prepares the user's state, makes the step state, and checks the model.

    Attributes:
        fn: ``(batch, prepared) -> (state, evidence)``, a pure function.
        load: Turns the state that the user passed to `run` into (a part of) a model state.
        loss: The loss, for the check. None if nothing is checked.
    """

    fn: Callable[[PyTree, PyTree], tuple[PyTree, Evidence]]
    load: Callable[[Any], PyTree]
    loss: Loss | None = None

    def __call__(self, batch: PyTree, init_state: Any = None) -> PyTree:
        """Returns the first step state, without a check."""
        return self.fn(batch, self.prepare(init_state))[0]

    def prepare(self, init_state: Any) -> PyTree:
        """Converts the ``init_state`` passed to `run` to arrays that `jax.jit` accepts."""
        return self.load(init_state)

    def check(self, evidence: Evidence) -> None:
        """Checks that the predictions for the first batch are what the loss takes.

        Raises:
            ArgumentError: The loss takes probabilities, and the predictions are not.
        """
        if self.loss is None or evidence is None or bool(np.asarray(evidence)):
            return
        raise ArgumentError(
            f"the loss {self.loss.name!r} takes probabilities, so the model's predictions must be "
            "in [0, 1] and sum to 1 over the classes, got other values for the first batch",
            fix="if the model returns logits, use from_logits=True (for example "
            "functools.partial(jl.losses.categorical_cross_entropy, from_logits=True)) or "
            "optax.softmax_cross_entropy, optax.sigmoid_binary_cross_entropy",
        )


def may_be_probabilities(loss: Loss, prediction: PyTree) -> jax.Array:
    """Returns whether the predictions for one batch can be probabilities, a boolean scalar."""
    checks = []
    for leaf in jax.tree.leaves(prediction):
        p = leaf.astype(jnp.float32)
        good = jnp.isnan(p) | ((p >= -1e-6) & (p <= 1 + 1e-6))
        checks.append(jnp.all(good))
        if "categorical" in loss.name and p.ndim > 1 and p.shape[-1] > 1:
            sums = jnp.sum(p, -1)
            checks.append(jnp.all(jnp.isnan(sums) | (jnp.abs(sums - 1) < 1e-2)))
    return jnp.all(jnp.stack(checks)) if checks else jnp.bool_(True)
