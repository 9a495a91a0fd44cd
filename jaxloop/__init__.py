"""The training loop that a JAX user would have written by hand, as a value.

import jaxloop as jl

loop = jl.trainer(model, loss, optimizer).metric("accuracy").validate(validation_data)
model_state = loop.run(train_data, epochs=20)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxloop.data import batches
from jaxloop.errors import JaxloopError
from jaxloop.events import Event, Status
from jaxloop.filters import after, before, every, every_seconds, once, only
from jaxloop.loop import Loop, loop
from jaxloop.metrics import Metric
from jaxloop.state import Snapshot, State, emit

if TYPE_CHECKING:
    from jaxloop import datasets, losses, metrics, optimizers
    from jaxloop.checkpoint import restore
    from jaxloop.factories import eval_step, evaluator, train_step, trainer
    from jaxloop.models import Model
    from jaxloop.serialize import deserialize_state, serialize_state

__version__ = "0.1.0"

__all__ = [
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
    "eval_step",
    "evaluator",
    "every",
    "every_seconds",
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

_LATER = {
    "Model": "jaxloop.models",
    "eval_step": "jaxloop.factories",
    "evaluator": "jaxloop.factories",
    "train_step": "jaxloop.factories",
    "trainer": "jaxloop.factories",
    "restore": "jaxloop.checkpoint",
    "serialize_state": "jaxloop.serialize",
    "deserialize_state": "jaxloop.serialize",
}
_MODULES = ("datasets", "losses", "metrics", "optimizers")


def __getattr__(name: str) -> Any:
    # What is heavy or seldom used is imported when it is first named.
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"jaxloop.{name}")
    raise AttributeError(f"module 'jaxloop' has no attribute {name!r}")
