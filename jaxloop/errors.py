"""The errors that jaxloop raises.

    raise DataError("run: data must have at least one batch, got none", fix="pass a batch")

Every error derives from `JaxloopError` and from the nearest builtin, so both
``except jl.JaxloopError`` and ``except ValueError`` catch it::

    JaxloopError
    ├── ArgumentError (ValueError)
    │   └── UnknownNameError
    ├── ArgumentTypeError (TypeError)
    ├── DataError (ValueError)
    ├── ShapeError (ValueError)
    ├── StructureError (TypeError)
    ├── ModelError (TypeError)
    ├── HandlerReturnError (TypeError)
    ├── HaltError (ValueError)
    ├── MissingMetricError (KeyError)
    ├── RecompilationError (RuntimeError)
    ├── CheckpointError (OSError)
    └── SerializationError (ValueError)
        └── DamagedError

The first line of a message says what must be true and what jaxloop got instead. The second line
starts with "fix:" and says what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from jaxloop._installation import check_no_foreign_files

# Checked here, because every other module imports this one, and `jaxloop/__init__.py` may belong to
# the other distribution.
check_no_foreign_files(Path(__file__).parent)


class JaxloopError(Exception):
    """The base class of every error that jaxloop raises.

    Args:
        message: What must be true, where, and what jaxloop got instead.
        fix: What to do about it. The error prints it on its own line.

    Example:
        >>> print(JaxloopError("fuse must be at least 1, got 0", fix="pass fuse='auto'"))
        fuse must be at least 1, got 0
          fix: pass fuse='auto'
    """

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message if fix is None else f"{message}\n  fix: {fix}")

    def __str__(self) -> str:
        # A KeyError would print the repr of its argument instead of the text.
        return str(self.args[0])


class ArgumentError(JaxloopError, ValueError):
    """An argument has the right type but an invalid value."""


class UnknownNameError(ArgumentError):
    """A name is unknown, such as the name of an event, filter, metric, loss, optimizer or mode."""


class ArgumentTypeError(JaxloopError, TypeError):
    """An argument has the wrong type."""


class DataError(JaxloopError, ValueError):
    """The data are empty or run out too early, or a batch is not what the step needs."""


class ShapeError(JaxloopError, ValueError):
    """An array has a shape that would give a wrong result."""


class StructureError(JaxloopError, TypeError):
    """The step state changed its structure, a shape or a dtype."""


class ModelError(JaxloopError, TypeError):
    """A model is of an unknown kind, or its state does not fit it."""


class HandlerReturnError(JaxloopError, TypeError):
    """A handler returned something other than None or (status, state)."""


class HaltError(JaxloopError, ValueError):
    """A handler asked to halt an epoch while no epoch was running."""


class MissingMetricError(JaxloopError, KeyError):
    """A handler reads a metric that does not exist."""


class RecompilationError(JaxloopError, RuntimeError):
    """With ``strict=True``, the step would have to be compiled again during the run."""


class CheckpointError(JaxloopError, OSError):
    """A checkpoint cannot be written or read."""


class SerializationError(JaxloopError, ValueError):
    """The bytes are not a serialized state, are damaged, or do not fit ``like``."""


class DamagedError(SerializationError):
    """A checkpoint or serialized state is truncated, altered or malformed."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """Returns the error for an unknown name. The error suggests the most similar known name.

    Example:
        >>> print(unknown_name("event", "epoch_complete", ["epoch_completed", "started"]))
        unknown event 'epoch_complete'; did you mean 'epoch_completed'?
          fix: use one of: epoch_completed, started
    """
    names = sorted(map(str, known))
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"unknown {kind} {name!r}{hint}", fix=f"use one of: {', '.join(names)}")


def missing_metric(handler: str, name: str, known: Iterable[str]) -> MissingMetricError:
    """Returns the error for a missing metric. The error lists the metrics that exist.

    Example:
        >>> print(missing_metric("early_stop", "los", ["loss"]))
        early_stop reads the metric 'los', which does not exist; the loop has: loss
          fix: attach the metric, or the handler that adds it (such as validate), before early_stop
    """
    return MissingMetricError(
        f"{handler} reads the metric {name!r}, which does not exist; the loop has: "
        f"{', '.join(sorted(known)) or 'none'}",
        fix=f"attach the metric, or the handler that adds it (such as validate), before {handler}",
    )


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class if it has no message."""
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__
