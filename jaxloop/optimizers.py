"""Optimizers and schedules by name, or any of Optax, with the extra arguments that they take.

    optimizer = get("adam", schedule("cosine_decay", 1e-3, steps=10_000, warmup=500))
    updates, state = optimizer.update(grads, optimizer.init(params), params, value=loss)

Invariant: an optimizer gets only the extra arguments that it takes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxloop._core.checks import as_number, check_count
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

LearningRate: TypeAlias = float | Callable[[Any], Any]
"""A learning rate, or a function of the number of updates so far, such as a `schedule`."""

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

SCHEDULES: dict[str, str] = {
    "constant": "the rate",
    "cosine_decay": "half a cosine from the rate to `end`",
    "exponential_decay": "the same factor each step, from the rate to `end`",
    "inverse_sqrt_decay": "the rate * sqrt(warmup / step), without an end",
    "linear_decay": "a line from the rate to `end`",
    "one_cycle": "half a cosine from the rate to `end`, after half a cosine up from rate / 25",
    "polynomial_decay": "(1 - progress) ** power, from the rate to `end`",
}
"""The named schedules, and what each is after its warmup."""

_ENDS = {"exponential_decay": 1e-2, "one_cycle": 1 / (25 * 1e4)}
"""The parts of the rate at which schedules end by default, if that is not 0."""


def get(
    optimizer: OptimizerLike, learning_rate: LearningRate | None = None
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer for a name or an Optax transformation.

    Args:
        optimizer: A name of `DEFAULT_LEARNING_RATES`, or any `optax.GradientTransformation`.
        learning_rate: The learning rate of a named optimizer, or a function from the number of the
            update to the rate, such as a `schedule`. None is the default rate. The state of an
            optimizer with a schedule holds its rate, so ``report=("learning_rate",)`` shows it.

    Returns:
        A transformation that takes any extra arguments, such as ``value=``, and passes on those
        that the optimizer takes. Its ``update`` raises an `ArgumentError` if the optimizer needs
        anything else.

    Raises:
        UnknownNameError: The name is unknown.
        ArgumentTypeError: ``optimizer`` is neither a name nor a transformation, or the learning
            rate is neither a number nor a function, or is given with a transformation.
        ArgumentError: The learning rate is negative or not finite.

    Example:
        >>> get("adm")
        Traceback (most recent call last):
        jaxloop.errors.UnknownNameError: unknown optimizer 'adm'; did you mean 'adam'?...
    """
    if isinstance(optimizer, str):
        if optimizer not in DEFAULT_LEARNING_RATES:
            raise unknown_name("optimizer", optimizer, DEFAULT_LEARNING_RATES)
        rate = DEFAULT_LEARNING_RATES[optimizer] if learning_rate is None else learning_rate
        return optax.with_extra_args_support(_named(optimizer, rate))
    if learning_rate is not None:
        raise ArgumentTypeError(
            "learning_rate must be given with the name of an optimizer, got it with a "
            f"{type(optimizer).__name__}",
            fix="give the rate to the optimizer itself, as in optax.adam(learning_rate)",
        )
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


def _named(name: str, rate: LearningRate) -> optax.GradientTransformation:
    # Optax warns if it gets no key for the noise.
    noisy = functools.partial(optax.noisy_sgd, key=0)
    make = noisy if name == "noisy_sgd" else getattr(optax, name)
    if callable(rate):
        return optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(rate)
    _check_rate("learning_rate", rate)
    return make(rate)


def schedule(
    name: str,
    rate: float,
    steps: int | None = None,
    *,
    warmup: int = 0,
    end: float | None = None,
    power: float = 2.0,
) -> Schedule:
    """Returns the schedule of a learning rate, as a value.

    Args:
        name: A name of `SCHEDULES`, which says what each does.
        rate: The highest learning rate.
        steps: The number of updates after which the rate stays at ``end``, warmup included. For a
            run of ``epochs``, that is ``epochs * len(data)``. "constant" and "inverse_sqrt_decay"
            need none.
        warmup: The number of updates in which the rate rises on a line from 0, at which the first
            update changes nothing, to ``rate``. For "one_cycle", it rises from ``rate / 25`` on
            half a cosine, by default for 30 % of the steps.
        end: The last rate. By default 0; for "exponential_decay" a hundredth of ``rate``, and for
            "one_cycle" ``rate / 250_000``, as in Optax.
        power: The power of "polynomial_decay".

    Returns:
        A function from the number of updates so far to the rate, a float32 scalar. Two of the same
        arguments are equal.

    Raises:
        UnknownNameError: The name is unknown. The error lists those that are known.
        ArgumentTypeError: An argument is no number.
        ArgumentError: An argument is out of range, or a schedule lacks its ``steps`` or ``warmup``.

    Example:
        >>> rate = schedule("linear_decay", 1.0, steps=10, warmup=5)
        >>> [round(float(rate(step)), 2) for step in (0, 1, 5, 6, 10, 20)]
        [0.0, 0.2, 1.0, 0.8, 0.0, 0.0]
    """
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    _check_rate("schedule: rate", rate)
    check_count("warmup", warmup, at_least=0, where="schedule")
    if name in ("constant", "inverse_sqrt_decay"):
        if name == "inverse_sqrt_decay" and not warmup:
            raise ArgumentError(
                "schedule: 'inverse_sqrt_decay' needs warmup, the step at which it begins to fall",
                fix="pass a number of steps such as warmup=1000",
            )
    elif steps is None:
        raise ArgumentError(
            f"schedule: {name!r} needs steps, the number of updates until its end",
            fix="pass steps=epochs * len(data)",
        )
    if steps is not None:
        check_count("steps", steps, at_least=1, where="schedule")
        if warmup >= steps:
            raise ArgumentError(
                f"schedule: warmup must be below steps ({steps}), got {warmup}",
                fix="pass a smaller warmup; steps counts the warmup too",
            )
    last = rate * _ENDS.get(name, 0.0) if end is None else end
    _check_rate("schedule: end", last)
    if name == "exponential_decay" and not (last > 0 and rate > 0):
        raise ArgumentError(
            f"schedule: 'exponential_decay' must have a rate and an end above 0, got {rate} and "
            f"{last}",
            fix="pass an end such as rate / 100",
        )
    _check_rate("schedule: power", power)
    return Schedule(name, float(rate), steps, warmup, float(last), float(power))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate as a function of the number of updates; made by `schedule`."""

    name: str
    rate: float
    steps: int | None
    warmup: int
    end: float
    power: float

    def __call__(self, step: ArrayLike) -> jax.Array:
        """Returns the rate of the update after ``step`` others, a float32 scalar."""
        done = jnp.asarray(step).astype(jnp.float32)
        rate, end, warmup = (jnp.float32(x) for x in (self.rate, self.end, self.warmup))
        if self.name == "one_cycle":
            assert self.steps is not None
            warmup = warmup if self.warmup else jnp.float32(0.3 * self.steps)
        last = jnp.float32(self.steps or self.warmup + 1)
        progress = jnp.clip((done - warmup) / (last - warmup), 0.0, 1.0)
        if self.name == "constant":
            falling = rate
        elif self.name == "inverse_sqrt_decay":
            falling = rate * jnp.sqrt(warmup / jnp.maximum(done, warmup))
        elif self.name == "exponential_decay":
            falling = rate * (end / rate) ** progress
        else:
            falling = end + (rate - end) * self._part(progress)
        return jnp.where(done < warmup, self._rising(done / jnp.maximum(warmup, 1.0)), falling)

    def _part(self, progress: jax.Array) -> jax.Array:
        """Returns how much of the way from ``rate`` to ``end`` is left."""
        if self.name == "linear_decay":
            return 1.0 - progress
        if self.name == "polynomial_decay":
            return (1.0 - progress) ** jnp.float32(self.power)
        return 0.5 * (1.0 + jnp.cos(jnp.float32(math.pi) * progress))

    def _rising(self, part: jax.Array) -> jax.Array:
        rate = jnp.float32(self.rate)
        if self.name != "one_cycle":
            return rate * part
        first = rate / 25
        return first + (rate - first) * 0.5 * (1.0 - jnp.cos(jnp.float32(math.pi) * part))


def _check_rate(name: str, rate: Any) -> None:
    number = as_number(rate)
    if number is None or isinstance(rate, bool):
        raise ArgumentTypeError(
            f"{name} must be a number, got {rate!r:.80}", fix="pass a number such as 1e-3"
        )
    if not (math.isfinite(number) and number >= 0):
        raise ArgumentError(
            f"{name} must be finite and at least 0, got {rate}", fix="pass a number such as 1e-3"
        )


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
