"""Optax's losses, recognized however they are wrapped, and called in their own order.

    loss = of_optax(functools.partial(optax.huber_loss, delta=0.5))
    values = loss.fn(y_true, y_pred)                 # calls huber_loss(y_pred, y_true, delta=0.5)

Optax's losses take ``(prediction, target)``. So do a `functools.partial`, a `jax.jit` and any other
wrapper of such a loss that has ``__wrapped__``, which `functools.wraps` sets.

Invariant: a loss that is not a mean over examples says so: with ``sums``, from which the value of a
whole data set can be computed, or with ``batchwise``, if there are none.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxloop import errors
from jaxloop._core.types import PyTree
from jaxloop.losses import _dice
from jaxloop.losses._labels import class_numbers, nan_unless, zero_or_one
from jaxloop.losses._loss import Labels, Loss, LossFn
from jaxloop.losses._shapes import as_float, same_shape

# The losses whose targets are class numbers, with one axis less than the predictions.
_INTEGER_LABELS = frozenset(
    {
        "softmax_cross_entropy_with_integer_labels",
        "multiclass_hinge_loss",
        "multiclass_perceptron_loss",
        "multiclass_sparsemax_loss",
    }
)
# The losses whose integer targets must be 0 or 1.
_BINARY_LABELS = frozenset({"sigmoid_binary_cross_entropy", "sigmoid_focal_loss", "sparsemax_loss"})
# Public in `optax.losses`, but not a loss of one prediction and one target.
_NOT_PAIRWISE = frozenset(
    {
        "ctc_loss",
        "ctc_loss_with_forward_probs",
        "make_fenchel_young_loss",
        "smooth_labels",
        "triplet_margin_loss",
    }
)
# These do not compare targets element by element, so Optax checks the shapes.
_FREE_SHAPES = frozenset({"ntxent"})


class Unwrapped(NamedTuple):
    """A function without its wrappers.

    Attributes:
        core: The function.
        keywords: The keywords that partials bind.
        transparent: Whether every wrapper is a `functools.partial` without positional arguments or
            a `jax.jit`, so that the whole means what ``core`` means with these keywords.
    """

    core: Any
    keywords: dict[str, Any]
    transparent: bool


def unwrap(fn: object) -> Unwrapped:
    """Removes partials, `jax.jit` and other wrappers, down to a loss of Optax or a bare function.

    Example:
        >>> import functools
        >>> unwrap(functools.partial(max, key=abs)).core is max
        True
    """
    core: Any = fn
    keywords: dict[str, Any] = {}
    transparent = True
    claims: Any = None
    # A wrapper may wrap itself, so the number of layers is bounded.
    for _ in range(100):
        if isinstance(core, functools.partial):
            keywords = {**core.keywords, **keywords}
            transparent = transparent and not core.args
            core = core.func
        elif hasattr(core, "__wrapped__") and not _is_exported(core):
            claims = core if _is_from_optax(core) else claims
            transparent = transparent and isinstance(core, jax.stages.Wrapped)
            core = core.__wrapped__
        else:
            break
    # The last function inside a `jax.vmap` is not the user's. But the outer one has the name and
    # module of the function that it was made from.
    if claims is not None and not _is_from_optax(core):
        core, transparent = claims, False
    return Unwrapped(core, keywords, transparent)


@functools.cache
def pairwise() -> dict[str, LossFn]:
    """Returns the losses of `optax.losses` that take one prediction and one target, by name."""
    return {n: f for n, f in _exported().items() if n not in _NOT_PAIRWISE}


def of_optax(fn: Callable[..., Any], name: str | None = None) -> Loss | None:
    """Returns the loss for a function of `optax.losses`, or None for any other function.

    Args:
        fn: A function of `optax.losses`, or one that wraps it.
        name: Its name. Defaults to that of Optax's function.

    Raises:
        ArgumentTypeError: The function of Optax is not a loss of one prediction and one target.

    Example:
        >>> import functools, optax
        >>> of_optax(functools.partial(optax.huber_loss, delta=0.5)).name
        'huber_loss'
    """
    if isinstance(fn, InOptaxOrder):
        return of_optax(fn.fn, name)
    core, keywords, transparent = unwrap(fn)
    if not _is_from_optax(core):
        return None
    optax_name = str(getattr(core, "__name__", "loss"))
    if optax_name in _NOT_PAIRWISE:
        raise errors.ArgumentTypeError(
            f"a loss must take one prediction and one target, got optax's {optax_name}",
            fix="wrap it in a function of (y_true, y_pred)",
        )
    extra: dict[str, Any] = {}
    averages = keywords.get("reduce_fn", jnp.mean) is jnp.mean and "where" not in keywords
    if optax_name == "ranking_softmax_loss" and transparent and averages:
        # Its default is the mean over the lists of the batch. Without it, weights apply to them.
        extra = {"reduce_fn": None}
    axis = keywords.get("axis", -1)
    axis = tuple(axis) if isinstance(axis, list | tuple) else axis
    swapped = InOptaxOrder(fn, optax_name, axis, tuple(extra.items()))
    has_labels = optax_name in _INTEGER_LABELS or optax_name in _BINARY_LABELS
    return Loss(
        name or optax_name,
        swapped,
        labels=swapped.labels if has_labels else None,
        sums=_dice.sums_of(optax_name, keywords) if transparent else None,
        batchwise=optax_name == "ntxent" or (optax_name != "dice_loss" and axis is None),
    )


@dataclass(frozen=True)
class InOptaxOrder:
    """A function of ``(y_true, y_pred)`` that calls a loss of Optax as ``fn(y_pred, y_true)``.

    Two of one function are equal, so that declared metrics are too.

    Attributes:
        fn: Optax's function, or a wrapper of it.
        name: The name of Optax's function.
        axis: The axes of one example over which it computes, or None for all axes of the batch.
        extra: More keywords.
    """

    fn: LossFn
    name: str
    axis: int | tuple[int, ...] | None = -1
    extra: tuple[tuple[str, Any], ...] = ()

    @property
    def __name__(self) -> str:
        """The name of the function, as of any function."""
        return self.name

    def __call__(self, *args: PyTree) -> ArrayLike:
        """Returns the loss of ``(y_true, y_pred)``. Other arguments go to Optax unchanged."""
        if len(args) != 2:
            return self.fn(*args)
        y_true, y_pred = args[0], as_float(args[1])
        self._check_axis(y_pred)
        valid: jax.Array | None = None
        if self.name in _INTEGER_LABELS:
            y_true, valid, _ = self._class_numbers(y_true, y_pred)
        elif self.name in _FREE_SHAPES:
            y_true = jnp.asarray(y_true)
        else:
            if self.name in _BINARY_LABELS:
                valid = self.labels(y_true, y_pred)[0].valid
            y_true, y_pred = same_shape(self.name, y_true, y_pred)
        # Optax mixes ranks and dtypes internally, even if the user forbids promotion.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            values = self.fn(y_pred, y_true, **dict(self.extra))
        if valid is None:
            return values
        values = jnp.asarray(values)
        return nan_unless(valid if valid.shape == values.shape else jnp.all(valid), values)

    def labels(self, y_true: ArrayLike, y_pred: ArrayLike) -> list[Labels]:
        """Returns the labels, and which of them are a class.

        Raises:
            ShapeError: The shapes do not fit.
            ArgumentTypeError: The labels are not integers.
        """
        if self.name in _BINARY_LABELS:
            numbers = jnp.asarray(y_true)
            # `sparsemax_loss` reads any number that is not 0 as class 1.
            hard = self.name == "sparsemax_loss"
            valid = (numbers == 0) | (numbers == 1) if hard else zero_or_one(numbers)
            return [Labels(numbers, valid, 2)]
        _, valid, num_classes = self._class_numbers(y_true, y_pred)
        return [Labels(jnp.asarray(y_true), valid, num_classes)]

    def _class_numbers(
        self, y_true: ArrayLike, y_pred: ArrayLike
    ) -> tuple[jax.Array, jax.Array, int]:
        """Returns labels that are classes, which of them were, and the number of classes."""
        shape = jnp.shape(y_pred)
        axes = self._axes(len(shape))
        expected = tuple(n for axis, n in enumerate(shape) if axis not in axes)
        if jnp.shape(y_true) != expected:
            raise errors.ShapeError(
                f"{self.name}: y_true must hold class numbers, with the shape of y_pred without "
                f"its axis of classes, got y_true {jnp.shape(y_true)} and y_pred {shape}",
                fix="pass one class number per example",
            )
        num_classes = math.prod(shape[axis] for axis in axes)
        return *class_numbers(self.name, y_true, num_classes), num_classes

    def _axes(self, ndim: int) -> tuple[int, ...]:
        if self.axis is None:
            return tuple(range(ndim))
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return tuple(axis % ndim for axis in axes) if ndim else ()

    def _check_axis(self, y_pred: jax.Array) -> None:
        # Over all axes, the result is a scalar, and so recognizable.
        if self.name != "dice_loss" and y_pred.ndim > 1:
            axes = self._axes(y_pred.ndim)
            if 0 in axes and len(set(axes)) < y_pred.ndim:
                raise errors.ShapeError(
                    f"{self.name}: axis must not include 0, the axis of the examples, got "
                    f"{self.axis} for predictions of shape {y_pred.shape}",
                    fix="pass the axes of one example, such as axis=-1",
                )


def is_optax_loss(fn: object) -> bool:
    """Returns whether a function is a loss of Optax of one prediction and one target, or wraps one.

    This does not import Optax.
    """
    core = fn.fn if isinstance(fn, InOptaxOrder) else unwrap(fn).core
    return _is_from_optax(core) and getattr(core, "__name__", "") not in _NOT_PAIRWISE


def target_first(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a loss of Optax as a function of ``(y_true, y_pred)``, and other functions as is."""
    loss = of_optax(fn) if is_optax_loss(fn) else None
    return fn if loss is None else loss.fn


def _is_from_optax(core: object) -> bool:
    in_losses = str(getattr(core, "__module__", "")).startswith("optax.losses")
    return in_losses or _is_exported(core)


@functools.cache
def _exported() -> dict[str, LossFn]:
    # Imported here, so that `import jaxloop` does not import Optax.
    import optax

    found = vars(optax.losses).items()
    return {name: fn for name, fn in found if callable(fn) and not name.startswith("_")}


def _is_exported(core: object) -> bool:
    # A function of Optax exists only if Optax has been imported.
    return "optax" in sys.modules and any(core is fn for fn in _exported().values())
