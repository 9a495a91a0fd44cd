"""JAX training loops as immutable values.

    import jaxloop as jl

    loop = jl.trainer(model, loss, optimizer).metric("accuracy").validate(validation_data)
    model_state = loop.run(train_data, epochs=20)

A loop never changes after you create it. Each method returns a new loop.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxloop._installation import check_no_foreign_files

if TYPE_CHECKING:
    from jaxloop import datasets, errors, handlers, losses, metrics, optimizers, writers
    from jaxloop._adopted.factory import from_train_step
    from jaxloop._checkpoint.bytes import deserialize_state, serialize_state
    from jaxloop._checkpoint.reader import restore
    from jaxloop._core.events import Event, Status
    from jaxloop._core.filters import after, before, every, every_seconds, once, only
    from jaxloop._core.sessions import Session
    from jaxloop._core.state import Snapshot, State
    from jaxloop._core.step_result import Emission, emit
    from jaxloop._data.in_memory import batches
    from jaxloop._data.mixture import mixture
    from jaxloop._factories import eval_step, evaluator, train_step, trainer
    from jaxloop._loop import Loop, loop
    from jaxloop._plotting.confusion import plot_confusion_matrix
    from jaxloop._plotting.curves import plot
    from jaxloop._plotting.timeline import plot_timeline
    from jaxloop._predict.factory import predictor
    from jaxloop._supervised.models import Model
    from jaxloop._weights.files import load_weights, save_weights
    from jaxloop.errors import JaxloopError, Terminated
    from jaxloop.losses import objective
    from jaxloop.metrics import Metric
    from jaxloop.metrics.windows import window

check_no_foreign_files(Path(__file__).parent)

__version__ = "0.1.0"

__all__ = [
    "Emission",
    "Event",
    "JaxloopError",
    "Loop",
    "Metric",
    "Model",
    "Session",
    "Snapshot",
    "State",
    "Status",
    "Terminated",
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
    "from_train_step",
    "handlers",
    "load_weights",
    "loop",
    "losses",
    "metrics",
    "mixture",
    "objective",
    "once",
    "only",
    "optimizers",
    "plot",
    "plot_confusion_matrix",
    "plot_timeline",
    "predictor",
    "restore",
    "save_weights",
    "serialize_state",
    "train_step",
    "trainer",
    "window",
    "writers",
]

# Where each name lives. A module is imported when one of its names is first used, so that
# `import jaxloop` costs nothing, and Optax and Orbax are imported only if you use them.
_HOMES = {
    "_adopted.factory": ("from_train_step",),
    "_checkpoint.bytes": ("deserialize_state", "serialize_state"),
    "_checkpoint.reader": ("restore",),
    "_core.events": ("Event", "Status"),
    "_core.filters": ("after", "before", "every", "every_seconds", "once", "only"),
    "_core.sessions": ("Session",),
    "_core.state": ("Snapshot", "State"),
    "_core.step_result": ("Emission", "emit"),
    "_data.in_memory": ("batches",),
    "_data.mixture": ("mixture",),
    "_factories": ("eval_step", "evaluator", "train_step", "trainer"),
    "_loop": ("Loop", "loop"),
    "_plotting.confusion": ("plot_confusion_matrix",),
    "_plotting.curves": ("plot",),
    "_plotting.timeline": ("plot_timeline",),
    "_predict.factory": ("predictor",),
    "_supervised.models": ("Model",),
    "_weights.files": ("load_weights", "save_weights"),
    "losses": ("objective",),
    "errors": ("JaxloopError", "Terminated"),
    "metrics": ("Metric",),
    "metrics.windows": ("window",),
}
_MODULES = ("datasets", "errors", "handlers", "losses", "metrics", "optimizers", "writers")


if not TYPE_CHECKING:  # hidden, so that type checkers report unknown names

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                value = getattr(importlib.import_module(f"jaxloop.{home}"), name)
                globals()[name] = value  # found at once the next time
                return value
        if name in _MODULES:
            return importlib.import_module(f"jaxloop.{name}")
        raise AttributeError(f"module 'jaxloop' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Tab completion in a notebook offers these names.
    return [*__all__, "__doc__", "__file__", "__name__", "__path__", "__version__"]
