"""Loss scaling for gradients in low precision: three functions of a small state.

    scale = get("dynamic")
    state = scale.init()
    scaled_loss = scale.scale(loss, state)
    grads, state = scale.unscale(grads, state)

Invariant: ``unscale`` undoes ``scale``, so gradients are those of the loss itself.

Source: Micikevicius et al., Mixed Precision Training, 2018, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentTypeError, unknown_name


class LossScale(NamedTuple):
    """Three pure functions of a state.

    Attributes:
        init: ``() -> state``.
        scale: ``(loss, state) -> loss``.
        unscale: ``(grads, state) -> (grads, state)``.
    """

    init: Callable[[], PyTree]
    scale: Callable[[jax.Array, PyTree], jax.Array]
    unscale: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


LossScaleLike: TypeAlias = (
    Literal["identity", "static", "dynamic"]
    | tuple[
        Callable[[], PyTree],
        Callable[[jax.Array, PyTree], jax.Array],
        Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    ]
)
"""A name, or the functions ``(init, scale, unscale)`` of a `LossScale`."""


def all_finite(tree: PyTree) -> jax.Array:
    """Returns whether no leaf has a NaN or an infinity, a boolean scalar.

    Example:
        >>> bool(all_finite({"a": jnp.array([1.0, jnp.inf])}))
        False
    """
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.bool_(True)


def _divide(grads: PyTree, scale: jax.Array) -> PyTree:
    def divide(grad: jax.Array) -> jax.Array:
        # A scale of 2**16 does not fit into float16, so narrow gradients are divided in float32.
        wide = grad.dtype if grad.dtype.itemsize >= scale.dtype.itemsize else scale.dtype
        return (grad.astype(wide) / scale.astype(wide)).astype(grad.dtype)

    return jax.tree.map(divide, grads)


def identity() -> LossScale:
    """Makes the loss scale that changes nothing."""
    return LossScale(lambda: {}, lambda loss, s: loss, lambda grads, s: (grads, s))


def static(scale: float = 2.0**15) -> LossScale:
    """Makes a fixed scale."""
    return LossScale(
        lambda: {"scale": jnp.float32(scale)},
        lambda loss, s: loss * s["scale"].astype(loss.dtype),
        lambda grads, s: (_divide(grads, s["scale"]), s),
    )


def dynamic(
    scale: float = 2.0**15, *, period: int = 2000, factor: float = 2.0, min_scale: float = 1.0
) -> LossScale:
    """Makes a scale that shrinks if gradients overflow, and grows after many steps if they do not.

    Args:
        scale: The first scale.
        period: The number of steps without overflow after which the scale grows.
        factor: The factor by which it grows and shrinks.
        min_scale: The smallest scale.
    """

    def init() -> PyTree:
        return {"scale": jnp.float32(scale), "count": jnp.int32(0)}

    def unscale(grads: PyTree, s: PyTree) -> tuple[PyTree, PyTree]:
        finite = all_finite(grads)
        count = s["count"] + 1
        grown = jnp.where(count >= period, s["scale"] * factor, s["scale"])
        # The scale itself must not overflow float32.
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


def get(loss_scale: LossScaleLike) -> LossScale:
    """Returns the loss scale for a name or three functions.

    Raises:
        UnknownNameError: The name is unknown.
        ArgumentTypeError: ``loss_scale`` is neither a name nor three functions.

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
        f"loss_scale must be a name or three functions, got {loss_scale!r:.80}",
        fix="pass 'identity', 'static', 'dynamic', or (init, scale, unscale)",
    )
