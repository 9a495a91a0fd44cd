"""Loss scaling for low-precision gradients: three functions on a small state.

scale = get("dynamic")
state = scale.init()
loss = scale.scale(loss, state)
grads, state = scale.unscale(grads, state)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentTypeError, unknown_name


class LossScale(NamedTuple):
    """``init() -> s``, ``scale(loss, s) -> loss``, ``unscale(grads, s) -> (grads, s)``."""

    init: Callable[[], PyTree]
    scale: Callable[[Any, PyTree], Any]
    unscale: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


def all_finite(tree: PyTree) -> jax.Array:
    """Whether no leaf has a NaN or an infinity: a boolean scalar.

    Example:
        >>> bool(all_finite({"a": jnp.array([1.0, jnp.inf])}))
        False
    """
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.bool_(True)


def _divide(grads: PyTree, scale: Any) -> PyTree:
    return jax.tree.map(lambda g: g / scale.astype(g.dtype), grads)


def identity() -> LossScale:
    """No scaling."""
    return LossScale(lambda: {}, lambda loss, s: loss, lambda grads, s: (grads, s))


def static(scale: float = 2.0**15) -> LossScale:
    """A fixed scale."""
    return LossScale(
        lambda: {"scale": jnp.float32(scale)},
        lambda loss, s: loss * s["scale"].astype(loss.dtype),
        lambda grads, s: (_divide(grads, s["scale"]), s),
    )


def dynamic(
    scale: float = 2.0**15, *, period: int = 2000, factor: float = 2.0, min_scale: float = 1.0
) -> LossScale:
    """A scale that shrinks when gradients overflow and grows after ``period`` steps without.

    Source: Micikevicius et al., Mixed Precision Training, 2018, section 3.2.

    Args:
        scale: The first scale.
        period: Finite steps after which it grows.
        factor: What it grows and shrinks by.
        min_scale: It goes no lower.
    """

    def init() -> PyTree:
        return {"scale": jnp.float32(scale), "count": jnp.int32(0)}

    def unscale(grads: PyTree, s: PyTree) -> tuple[PyTree, PyTree]:
        finite = all_finite(grads)
        count = s["count"] + 1
        grown = jnp.where(count >= period, s["scale"] * factor, s["scale"])
        # Growth must not itself overflow float32.
        grown = jnp.where(jnp.isfinite(grown), grown, s["scale"])
        shrunk = jnp.maximum(s["scale"] / factor, jnp.float32(min_scale))
        after = {
            "scale": jnp.where(finite, grown, shrunk),
            "count": jnp.where(finite & (count < period), count, 0),
        }
        return _divide(grads, s["scale"]), after

    return LossScale(init, lambda loss, s: loss * s["scale"].astype(loss.dtype), unscale)


_BY_NAME: dict[str, Callable[[], LossScale]] = {
    "identity": identity,
    "static": static,
    "dynamic": dynamic,
}


def get(loss_scale: Any) -> LossScale:
    """The loss scale that a name or three functions mean.

    Raises:
        UnknownNameError: The name is unknown.
        ArgumentTypeError: It is neither a name nor three functions.

    Example:
        >>> float(get("static").init()["scale"])
        32768.0
    """
    if isinstance(loss_scale, str):
        if loss_scale not in _BY_NAME:
            raise unknown_name("loss_scale", loss_scale, _BY_NAME)
        return _BY_NAME[loss_scale]()
    if isinstance(loss_scale, tuple) and len(loss_scale) == 3 and all(map(callable, loss_scale)):
        return LossScale(*loss_scale)
    raise ArgumentTypeError(
        f"loss_scale must be a name or three functions, and is {loss_scale!r:.80}",
        fix="use 'identity', 'static', 'dynamic', or (init, scale, unscale)",
    )
