"""The built-in handlers, and everything that you need to write a handler package.

    from jaxloop.handlers import Handler, as_events, as_filter

    def greet(loop, name, *, event="started"):
        return loop.attach(Handler(as_events(event), as_filter("always"), "greet", fn))

A handler is a function from loop to loop. `Loop` has the built-in ones as methods:
``jl.handlers.early_stop(loop, "loss")`` and ``loop.early_stop("loss")`` are the same.
"""

from __future__ import annotations

from jaxloop._core.dry import DryRun, left_out
from jaxloop._core.events import as_events
from jaxloop._core.filters import Filter, as_filter
from jaxloop._spec import (
    Attachment,
    CheckpointTrigger,
    Guard,
    GuardAction,
    Handler,
    HandlerFn,
    HandlerResult,
    LoopSpec,
    Observer,
    ObserverFn,
    OpenFn,
    RunStart,
    SpecT,
    Store,
)
from jaxloop.handlers.alert import Alert, AlertFn, AlertKind, alert
from jaxloop.handlers.attach import derive, from_state, handle, metric, observe, resume
from jaxloop.handlers.checkpoint import FolderStore, checkpoint
from jaxloop.handlers.early_stop import early_stop
from jaxloop.handlers.log import log
from jaxloop.handlers.monitor import is_better, monitor, read_scalar
from jaxloop.handlers.nan_guard import nan_guard
from jaxloop.handlers.profile import profile
from jaxloop.handlers.progress import progress
from jaxloop.handlers.reduce_lr import reduce_lr_on_plateau
from jaxloop.handlers.validate import validate
from jaxloop.handlers.write import write

__all__ = [
    "Alert",
    "AlertFn",
    "AlertKind",
    "Attachment",
    "CheckpointTrigger",
    "DryRun",
    "Filter",
    "FolderStore",
    "Guard",
    "GuardAction",
    "Handler",
    "HandlerFn",
    "HandlerResult",
    "LoopSpec",
    "Observer",
    "ObserverFn",
    "OpenFn",
    "RunStart",
    "SpecT",
    "Store",
    "alert",
    "as_events",
    "as_filter",
    "checkpoint",
    "derive",
    "early_stop",
    "from_state",
    "handle",
    "is_better",
    "left_out",
    "log",
    "metric",
    "monitor",
    "nan_guard",
    "observe",
    "profile",
    "progress",
    "read_scalar",
    "reduce_lr_on_plateau",
    "resume",
    "validate",
    "write",
]
