"""The learning rate range test: the loss after steps whose rate grows from tiny to huge.

    test = loop.find_learning_rate(train_data)
    test.suggestion                         # a rate at which the loss falls fastest
    test.plot()

It is a short run of a loop without the handlers of the user's loop, with one of its own, which sets
the rate and reads the loss. The user's loop stays as it is.

Source: Smith, "Cyclical learning rates for training neural networks", 2017, and `lr_find` of Howard
and others, fastai, 2018, whose suggestion "steep" is the one here.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._core.checks import as_number, check_count
from jaxloop._core.events import Event, Status, StatusLike
from jaxloop._core.filters import ALWAYS
from jaxloop._core.interrupts import Interrupted
from jaxloop._core.state import State
from jaxloop._core.types import DataLike, PyTree
from jaxloop._engine.run import final_state
from jaxloop._plotting.learning_rates import draw_rates
from jaxloop._spec import Handler, LoopSpec
from jaxloop.errors import ArgumentError, ArgumentTypeError, StructureError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_RATES = (1e-7, 10.0)
_MULTIPLES = (1e-4, 1e4)
"""The default range of multiples, with which a rate of 1e-3 gives the range of rates above."""
_DECAY = 0.9
"""The decay of the running average that shows divergence during the test."""
_DIVERGED = 3.0
"""The loss has diverged if it exceeds its lowest average by this many times the larger of that
average and of the loss that was gained."""
_NOISES = 2.0
"""A fall counts if it is larger than this many standard deviations of a batch's loss."""
_FEWEST = 10


@dataclasses.dataclass(frozen=True, eq=False)
class LearningRateTest:
    """The result of `find_learning_rate`.

    Attributes:
        rates: ``(n,)`` of float64, the rates of the steps, in ascending order.
        losses: ``(n,)`` of float64, the loss of the next batch right after each of these steps.
        smoothed: ``(n,)`` of float64, the losses without the noise of single batches.
        suggestion: The rate at which the smoothed loss falls fastest, or None if it falls nowhere
            by more than the noise of single batches.
        is_absolute: Whether the rates are learning rates. If not, they are multiples of the
            optimizer's own rate.
        diverged: Whether the loss diverged before the highest rate, where the test stopped.
    """

    rates: Floats
    losses: Floats
    smoothed: Floats
    suggestion: float | None
    is_absolute: bool
    diverged: bool

    def plot(self, *, figure: Figure | None = None) -> Figure:
        """Draws the losses by rate, with the suggestion.

        Args:
            figure: See `jaxloop.plot`.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        label = "learning rate"
        if not self.is_absolute:
            label = "multiple of the optimizer's own learning rate"
        return draw_rates(
            self.rates, self.losses, self.smoothed, self.suggestion, label, figure=figure
        )

    def __repr__(self) -> str:
        unit = "" if self.is_absolute else " times the optimizer's own learning rate"
        found = "none, because the loss does not fall by more than its noise"
        if self.suggestion is not None:
            found = f"{self.suggestion:.3g}{unit}"
        tried = f"{len(self.rates)} rates"
        if len(self.rates):
            tried += f" from {self.rates[0]:.3g} to {self.rates[-1]:.3g}{unit}"
        return f"LearningRateTest(suggestion: {found}; {tried}" + (
            "; then the loss diverged)" if self.diverged else ")"
        )


def find_learning_rate(
    loop: LoopSpec[Any, Any],
    data: DataLike,
    init_state: Any = None,
    *,
    lowest: float | None = None,
    highest: float | None = None,
    num_steps: int = 100,
    optimizer_rate: float | None = None,
) -> LearningRateTest:
    """Runs a learning rate range test: a few steps whose learning rate grows exponentially.

    The loss first stays as it is, then falls, and at last diverges, where the test stops. A good
    rate is one at which it falls fast. That is a start for a search, not its end, and the best rate
    of a long training, in particular one with a schedule, may be a few times smaller or larger.

    The test begins with the initial state, or with ``init_state``, and reads the data from their
    first epoch on. It runs no handler, observer or checkpoint of the loop, and returns nothing of
    what it trained. The compiled step is that of the loop, so a later `run` need not compile it.

    The learning rate of most optimizers of Optax is not visible from outside. It is known if you
    made the trainer with the name of an optimizer, wrapped the optimizer in
    `optax.inject_hyperparams`, or pass ``optimizer_rate``. Otherwise the rates here are multiples
    of it. The test scales the updates of the optimizer. This is the same as another rate if its
    updates are proportional to its rate, as those of SGD, momentum and Adam with all relatives are.
    With a schedule, the rates are multiples of what the schedule says at each step, and a warning
    says so. It is better to test an optimizer with a constant rate.

    Args:
        loop: A loop made by `trainer`.
        data: The training data: an iterable that is no iterator, or a function
            ``epoch -> iterable``.
        init_state: See `run`.
        lowest: The first rate. 1e-7 by default, or 1e-4 if the rates are multiples.
        highest: The last rate. 10 by default, or 1e4 if the rates are multiples.
        num_steps: The number of rates, at least 10.
        optimizer_rate: The constant learning rate that the optimizer was made with.

    Returns:
        The rates, the losses and a suggestion; see `LearningRateTest`.

    Raises:
        ArgumentTypeError: The loop is not a trainer, or an argument has the wrong type.
        ArgumentError: An argument is out of range, or the data are a one-shot iterator, which the
            test would use up.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxloop as jl
        >>> model = (lambda key, x: jnp.zeros((1, 1)), lambda w, x: x @ w)
        >>> x = jnp.linspace(-1.0, 1.0, 32)[:, None]
        >>> loop = jl.trainer(model, "mean_squared_error", "sgd", log=0)
        >>> test = loop.find_learning_rate([(x, 2 * x)])
        >>> test.is_absolute, 0.01 < test.suggestion < 3
        (True, True)
    """
    if loop.task is None or not loop.task.trains:
        raise ArgumentTypeError(
            "find_learning_rate: the loop must be one of jl.trainer, got another, whose learning "
            "rate and loss are unknown",
            fix="use jl.trainer, or run your own step for some rates",
        )
    _check_data(data)
    check_count("num_steps", num_steps, at_least=_FEWEST, where="find_learning_rate")
    for name, rate in (
        ("lowest", lowest),
        ("highest", highest),
        ("optimizer_rate", optimizer_rate),
    ):
        _check_rate(name, rate)
    known = loop.task.learning_rate if optimizer_rate is None else optimizer_rate
    test = _Test((lowest, highest), int(num_steps), known)
    events = (Event.STARTED, Event.ITERATION_COMPLETED)
    bare = loop.replace(
        attachments=(Handler(events, ALWAYS, "find_learning_rate", test, adds=()),),
        start=None,
        resume_path=None,
        best_from=None,
        output_transform=None,
        show=None,
    )
    state = final_state(bare, data, init_state, steps=num_steps + 1)
    if state.status == "interrupted":
        raise Interrupted(f"the learning rate test was interrupted by {state.halted_by}")
    return test.result()


def _check_data(data: object) -> None:
    if hasattr(data, "__next__"):
        raise ArgumentError(
            "find_learning_rate: the data must be an iterable that can be read again, got a "
            "one-shot iterator, which the test would use up",
            fix="pass a list, jl.batches or a function epoch -> iterable",
        )


def _check_rate(name: str, rate: object) -> None:
    if rate is None:
        return
    number = as_number(rate)
    if number is None or isinstance(rate, bool):
        raise ArgumentTypeError(
            f"find_learning_rate: {name} must be a number, got {rate!r:.80}",
            fix="pass a rate such as 1e-3",
        )
    if not (0 < number < math.inf):
        raise ArgumentError(
            f"find_learning_rate: {name} must be positive and finite, got {rate}",
            fix="pass a rate such as 1e-3",
        )


class _Test:
    """The handler of one test.

    Args:
        bounds: The lowest and the highest rate, or None for the default.
        num: The number of rates.
        optimizer_rate: The optimizer's own rate, if the user or the name of the optimizer says it.
    """

    def __init__(
        self, bounds: tuple[float | None, float | None], num: int, optimizer_rate: float | None
    ) -> None:
        self._bounds, self._num, self._rate = bounds, num, optimizer_rate
        self._losses: list[float] = []
        self._average, self._lowest = 0.0, math.inf
        self._diverged = False
        self._rates: Floats = np.empty(0)

    def __call__(self, state: State[Any]) -> tuple[StatusLike, State[Any]]:
        if state.event is Event.STARTED:
            self._begin(state.step_state)
        else:
            loss = float(state.outputs["loss"])
            if self._has_diverged(loss):
                self._diverged = True
                return Status.HALT_LOOP, state
            self._losses.append(loss)
        index = min(len(self._losses), self._num - 1)
        rate = self._rates[index] / (self._rate or 1.0)
        scale = jnp.asarray(rate, state.step_state["learning_rate_scale"].dtype)
        step_state = {**state.step_state, "learning_rate_scale": scale}
        return Status.CONTINUE, state.replace(step_state=step_state)

    def _begin(self, step_state: PyTree) -> None:
        if _follows_schedule(step_state["optimizer_state"]):
            warnings.warn(
                "find_learning_rate: the optimizer's learning rate follows a schedule, so the "
                "rates are multiples of what it says at each step\n"
                "  fix: test a trainer whose optimizer has a constant rate",
                stacklevel=2,
            )
            self._rate = None
        elif self._rate is None:
            self._rate = _injected_rate(step_state["optimizer_state"])
        defaults = _MULTIPLES if self._rate is None else _RATES
        low, high = (
            b if a is None else float(a) for a, b in zip(self._bounds, defaults, strict=True)
        )
        if not low < high:
            raise ArgumentError(
                f"find_learning_rate: lowest must be less than highest, got {low:g} and {high:g}",
                fix="pass lowest=1e-7, highest=10.0, or leave both out",
            )
        self._rates = np.geomspace(low, high, self._num)

    def _has_diverged(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        num = len(self._losses)
        self._average = _DECAY * self._average + (1 - _DECAY) * loss
        average = self._average / (1 - _DECAY ** (num + 1))  # without the zero that it began with
        self._lowest = min(self._lowest, average)
        if num < 3:
            return False
        gained = self._losses[0] - self._lowest
        return average > self._lowest + _DIVERGED * max(abs(self._lowest), gained)

    def result(self) -> LearningRateTest:
        """Returns the result. The first loss is that of the state before any step."""
        if not self._losses:
            raise StructureError(
                "find_learning_rate: the loss of the first batch must be finite, got one that is "
                "not",
                fix="check the data, the model and the loss; loop.check(data) may say more",
            )
        losses = np.asarray(self._losses[1:], np.float64)
        rates = self._rates[: len(losses)]
        smoothed = _smoothed(losses, self._losses[0], self._num)
        suggestion = _steepest(rates, losses, smoothed, self._losses[0])
        absolute = self._rate is not None
        return LearningRateTest(rates, losses, smoothed, suggestion, absolute, self._diverged)


def _follows_schedule(optimizer_state: PyTree) -> bool:
    # Imported here, because `import jaxloop` imports no Optax. A trainer has imported it.
    import optax

    def is_schedule(node: object) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    leaves = jax.tree_util.tree_leaves_with_path(optimizer_state, is_leaf=is_schedule)
    return any(
        is_schedule(leaf) or "hyperparams_states['learning_rate']" in jax.tree_util.keystr(path)
        for path, leaf in leaves
    )


def _injected_rate(optimizer_state: PyTree) -> float | None:
    """Returns the constant rate of `optax.inject_hyperparams`, or None if there is not one."""
    paths = jax.tree_util.tree_leaves_with_path(optimizer_state)
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in paths]
    found = [leaf for path, leaf in named if path.endswith("hyperparams['learning_rate']")]
    if len(found) != 1 or jnp.ndim(found[0]):
        return None
    rate = float(found[0])
    return rate if 0 < rate < math.inf else None


def _smoothed(losses: Floats, first: float, num: int) -> Floats:
    """Returns the losses averaged over neighbours, so that the curve is not moved to one side."""
    if not len(losses):
        return losses
    # A diverging loss would reach far back into the averages.
    capped = np.minimum(losses, max(first, float(np.median(losses))))
    width = max(1.0, num / 40)
    offsets = np.arange(len(losses))
    weights = np.exp(-0.5 * ((offsets[:, None] - offsets) / width) ** 2)
    smoothed: Floats = weights @ capped / weights.sum(axis=1)
    return smoothed


def _steepest(rates: Floats, losses: Floats, smoothed: Floats, first: float) -> float | None:
    """Returns the rate at which the smoothed loss falls fastest, before its lowest point."""
    if len(losses) < _FEWEST // 2:
        return None
    end = int(np.argmin(smoothed)) + 1
    noise = float(np.std(losses[:end] - smoothed[:end]))
    # The loss of one batch may be high by chance, so the fall begins at the mean of several.
    start = float(np.mean([first, *losses[: len(losses) // 10]]))
    if end < 3 or start - smoothed[end - 1] <= _NOISES * noise:
        return None
    slope = np.gradient(smoothed[:end], np.log(rates[:end]))
    return float(rates[int(np.argmin(slope))])
