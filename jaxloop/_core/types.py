"""Type names that every layer uses.

    def step(batch: PyTree, step_state: PyTree) -> PyTree: ...

Nothing here imports from jaxloop, so any module may import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

# S is the type of a loop's step state. OutputT is the result type of `run`, and ResultT the result
# type of an output transform that is passed to `run`.
if TYPE_CHECKING:  # with a default, `State` alone means `State[Any]`
    # Type checkers provide this module.
    from typing_extensions import TypeVar

    S = TypeVar("S", default=Any)
    OutputT = TypeVar("OutputT", default=Any)
    ResultT = TypeVar("ResultT", default=Any)
else:
    from typing import TypeVar

    S = TypeVar("S")
    OutputT = TypeVar("OutputT")
    ResultT = TypeVar("ResultT")

PyTree: TypeAlias = Any
"""A pytree of arrays. JAX has no static type for one, and neither does Python."""

BatchFn: TypeAlias = Callable[[PyTree, PyTree], PyTree]
"""A function of a batch and a step state, such as a step or an init function."""

DataLike: TypeAlias = Iterable[PyTree] | Callable[[int], Iterable[PyTree]] | None
"""An iterable of batches, a function ``epoch -> iterable``, or None for steps without data."""

Mode: TypeAlias = Literal["auto", "min", "max"] | Callable[[float, float], bool]
"""Which of two values is better: the smaller, the larger, or as ``mode(new, best)`` decides.

"auto" means what the metric says; see `Metric`.
"""

Better: TypeAlias = Literal["min", "max"]
"""Which values of a metric are better: the smaller or the larger ones."""

Fuse: TypeAlias = int | Literal["auto"]
"""The maximum number of iterations in one compiled block."""

JitOptions: TypeAlias = bool | Mapping[str, Any]
"""Whether to compile, or the options for `jax.jit`."""
