"""Optimizers by name, or any of Optax, with the extra arguments that they take.

    optimizer = get("adam")
    updates, state = optimizer.update(grads, optimizer.init(params), params, value=loss)

Invariant: an optimizer gets only the extra arguments that it takes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import jax
import optax

from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentError, ArgumentTypeError, first_line, unknown_name


class Optimizer(Protocol):
    """Two pure functions, such as those of `optax.GradientTransformation` or `optax.MultiSteps`."""

    def init(self, params: PyTree, /) -> PyTree:
        """Returns the initial optimizer state."""

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree = None, /
    ) -> tuple[PyTree, PyTree]:
        """Returns the updates and the next state."""


OptimizerLike: TypeAlias = str | Optimizer
"""A name of `DEFAULT_LEARNING_RATES`, or any optimizer of Optax."""

DEFAULT_LEARNING_RATES: dict[str, float] = {
    "adabelief": 1e-3,
    "adagrad": 1e-3,
    "adam": 1e-3,
    "adamw": 1e-3,
    "fromage": 1e-2,
    "lamb": 1e-2,
    "noisy_sgd": 1e-2,
    "radam": 1e-3,
    "rmsprop": 1e-2,
    "sgd": 1e-2,
    "yogi": 1e-2,
}
"""The named optimizers and their learning rates, which are the defaults of Axon."""


def get(optimizer: OptimizerLike) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer for a name or an Optax transformation.

    Args:
        optimizer: A name of `DEFAULT_LEARNING_RATES`, or any `optax.GradientTransformation`.

    Returns:
        A transformation that takes any extra arguments, such as ``value=``, and passes on those
        that the optimizer takes. Its ``update`` raises an `ArgumentError` if the optimizer needs
        anything else.

    Raises:
        UnknownNameError: The name is unknown.
        ArgumentTypeError: ``optimizer`` is neither a name nor a transformation.

    Example:
        >>> get("adm")
        Traceback (most recent call last):
        jaxloop.errors.UnknownNameError: unknown optimizer 'adm'; did you mean 'adam'?...
    """
    if isinstance(optimizer, str):
        if optimizer not in DEFAULT_LEARNING_RATES:
            raise unknown_name("optimizer", optimizer, DEFAULT_LEARNING_RATES)
        rate = DEFAULT_LEARNING_RATES[optimizer]
        # Optax warns if it gets no key for the noise.
        made = optax.noisy_sgd(rate, key=0) if optimizer == "noisy_sgd" else None
        made = made or getattr(optax, optimizer)(rate)
        return optax.with_extra_args_support(made)
    # Only the two functions count, because `optax.MultiSteps` is not a GradientTransformation.
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ArgumentTypeError(
            "an optimizer must be a name or an optax.GradientTransformation, got a "
            f"{type(optimizer).__name__} ({optimizer!r:.80})",
            fix="pass an optimizer such as optax.adam(1e-3), or a name such as 'adam'",
        )
    takes_none = isinstance(optimizer, optax.GradientTransformation) and not isinstance(
        optimizer, optax.GradientTransformationExtraArgs
    )
    # By Optax's own rule, the class says that `update` takes no extra arguments. For all others, a
    # signature says little, because wrappers such as `optax.chain` pass on whatever they get.
    update = _ignoring(optimizer.update) if takes_none else _selecting(optimizer.update)
    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def default_rate(optimizer: OptimizerLike) -> float | None:
    """Returns the learning rate of an optimizer that is given by its name, otherwise None.

    Example:
        >>> default_rate("adam"), default_rate(optax.adam(1e-4))
        (0.001, None)
    """
    return DEFAULT_LEARNING_RATES.get(optimizer) if isinstance(optimizer, str) else None


def _ignoring(update: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an update function that ignores all extra arguments."""

    def ignoring(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any) -> Any:
        return _selecting(update)(updates, state, params)

    return ignoring


def _selecting(update: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an update function that passes on as many extra arguments as ``update`` takes."""

    def selecting(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any) -> Any:
        try:
            return update(updates, state, params, **extra_args)
        except _WRONG_ARGUMENTS as error:
            taken = _largest_choice(update, (updates, state, params), extra_args, error)
        return update(updates, state, params, **taken)

    return selecting


_WRONG_ARGUMENTS = (TypeError, ValueError, AttributeError, LookupError)
"""The errors of a function that gets arguments of another number, name or structure."""


def _largest_choice(
    update: Callable[..., Any],
    arguments: tuple[PyTree, PyTree, PyTree],
    extra_args: dict[str, Any],
    error: Exception,
) -> dict[str, Any]:
    """Returns the largest choice of extra arguments with which ``update`` can be traced.

    Raises:
        ArgumentError: There is none, or ``error`` does not say that one was refused.
    """
    # Python and Optax both say so in these words. Any other error must not be hidden by dropping
    # an argument that the optimizer does take.
    problems = [_describe(error)]
    if "unexpected keyword argument" in str(error).lower():
        for choice in _choices(extra_args):
            try:
                jax.eval_shape(functools.partial(update, **choice), *arguments)
            except _WRONG_ARGUMENTS as other:
                problems.append(_describe(other))
            else:
                return choice
        # A problem that no choice of keywords solves says more than the keywords.
        last = next((text for text in problems if "keyword" not in text), problems[-1])
        problems = [problems[0], last]
    passed = f" (the trainer passes {', '.join(extra_args)})" if extra_args else ""
    raise ArgumentError(
        "the optimizer must be able to update the model's parameters, got "
        f"{'; with fewer arguments, '.join(problems)}{passed}",
        fix="pass an optimizer that needs only the gradients, its state, the parameters of the "
        "model and these arguments; if yours needs more, as optax.lookahead does, write your own "
        "step with jl.loop",
    ) from error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _choices(extra_args: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Returns all smaller choices of the extra arguments, the largest first."""
    for number in reversed(range(len(extra_args))):
        for names in itertools.combinations(extra_args, number):
            yield {name: extra_args[name] for name in names}
