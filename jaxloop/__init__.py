"""JAX training loops as immutable values.

    import jaxloop as jl

    loop = jl.trainer(model, loss, optimizer).metric("accuracy").validate(validation_data)
    model_state = loop.run(train_data, epochs=20)

A loop never changes after you create it. Each method returns a new loop.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxloop import errors, handlers
from jaxloop._core.events import Event, Status
from jaxloop._core.filters import after, before, every, every_seconds, once, only
from jaxloop._core.state import Snapshot, State
from jaxloop._core.step_result import Emission, emit
from jaxloop._data.in_memory import batches
from jaxloop._loop import Loop, loop
from jaxloop.errors import JaxloopError
from jaxloop.metrics import Metric

if TYPE_CHECKING:
    from jaxloop import datasets, losses, metrics, optimizers
    from jaxloop._checkpoint.bytes import deserialize_state, serialize_state
    from jaxloop._checkpoint.reader import restore
    from jaxloop._factories import eval_step, evaluator, train_step, trainer
    from jaxloop._supervised.models import Model

__version__ = "0.1.0"

__all__ = [
    "Emission",
    "Event",
    "JaxloopError",
    "Loop",
    "Metric",
    "Model",
    "Snapshot",
    "State",
    "Status",
    "after",
    "batches",
    "before",
    "datasets",
    "deserialize_state",
    "emit",
    "errors",
    "eval_step",
    "evaluator",
    "every",
    "every_seconds",
    "handlers",
    "loop",
    "losses",
    "metrics",
    "once",
    "only",
    "optimizers",
    "restore",
    "serialize_state",
    "train_step",
    "trainer",
]

# Imported on first access, because they import Optax or Orbax, or are seldom used.
_LAZY_NAMES = {
    "Model": "jaxloop._supervised.models",
    "eval_step": "jaxloop._factories",
    "evaluator": "jaxloop._factories",
    "train_step": "jaxloop._factories",
    "trainer": "jaxloop._factories",
    "restore": "jaxloop._checkpoint.reader",
    "serialize_state": "jaxloop._checkpoint.bytes",
    "deserialize_state": "jaxloop._checkpoint.bytes",
}
_LAZY_MODULES = ("datasets", "losses", "metrics", "optimizers")


if not TYPE_CHECKING:  # hidden, so that type checkers report unknown names

    def __getattr__(name: str) -> Any:
        if name in _LAZY_NAMES:
            return getattr(importlib.import_module(_LAZY_NAMES[name]), name)
        if name in _LAZY_MODULES:
            return importlib.import_module(f"jaxloop.{name}")
        raise AttributeError(f"module 'jaxloop' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Tab completion in a notebook offers these names.
    return [*__all__, "__doc__", "__file__", "__name__", "__path__", "__version__"]
