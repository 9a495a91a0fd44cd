"""The errors that jaxloop raises.

    raise DataError("run: data must have at least one batch, got none", fix="pass a batch")

Every error derives from `JaxloopError` and from the nearest builtin, so both
``except jl.JaxloopError`` and ``except ValueError`` catch it. `Terminated` is not an error, and
``except Exception`` does not catch it::

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
    ├── MissingExtraError (ImportError)
    ├── ShardingError (ValueError)
    ├── CheckpointError (OSError)
    ├── SerializationError (ValueError)
    │   └── DamagedError
    └── WriterError (RuntimeError)

    Terminated (SystemExit)

The first line of a message says what must be true and what jaxloop got instead. The second line
starts with "fix:" and says what to do.

Every exception that leaves a run has the attribute ``loop_state``, whatever its class. It is the
last good `State`, or None if the run had none.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxloop._installation import check_no_foreign_files

# Checked here, because every other module imports this one, and `jaxloop/__init__.py` may belong to
# the other distribution.
check_no_foreign_files(Path(__file__).parent)

if TYPE_CHECKING:
    from jaxloop._core.state import State


class JaxloopError(Exception):
    """The base class of every error that jaxloop raises.

    Args:
        message: What must be true, where, and what jaxloop got instead.
        fix: What to do about it. The error prints it on its own line.

    Attributes:
        loop_state: The last good `State` of the run that raised it, or None if there is none.
            ``loop.from_state(error.loop_state)`` continues from it.

    Example:
        >>> print(JaxloopError("fuse must be at least 1, got 0", fix="pass fuse='auto'"))
        fuse must be at least 1, got 0
          fix: pass fuse='auto'
    """

    loop_state: State[Any] | None = None

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


class MissingExtraError(JaxloopError, ImportError):
    """A package that is an extra of jaxloop is not installed.

    Args:
        what: What needs it.
        package: The package.
        extra: The extra of jaxloop that installs it.

    Example:
        >>> print(MissingExtraError("a picture", "matplotlib", "plot"))
        a picture needs matplotlib, which is not installed
          fix: pip install 'functional-jaxloop[plot]'
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(
            f"{what} needs {package}, which is not installed",
            fix=f"pip install 'functional-jaxloop[{extra}]'",
        )
        self.name = package  # as ImportError has it


class ShardingError(JaxloopError, ValueError):
    """A batch is sharded, a mesh has explicit axes, or several processes run: not supported yet."""


class CheckpointError(JaxloopError, OSError):
    """A checkpoint cannot be written or read."""


class SerializationError(JaxloopError, ValueError):
    """The bytes are not a serialized state, are damaged, or do not fit ``like``."""


class DamagedError(SerializationError):
    """A checkpoint or serialized state is truncated, altered or malformed."""


class WriterError(JaxloopError, RuntimeError):
    """A writer of metrics failed, or its file belongs to something else."""


class Terminated(SystemExit):
    """SIGTERM ended a run, and now ends the script.

    `run` and `stream` raise it when the state is saved and everything is closed. If you do not
    catch it, ``finally`` blocks run and the process exits with code 143, as after SIGTERM. It is a
    `SystemExit` and not an `Exception`, so ``except Exception`` does not keep the script alive.

    Args:
        state: The final state of the run, or None.

    Attributes:
        state: The final `State`. None if the signal arrived before the first state was made.
        loop_state: The same, as on every exception that leaves a run.

    Example:
        >>> ended = Terminated(None)
        >>> ended.code
        143
        >>> print(ended)
        SIGTERM ended the run before it had a state
    """

    def __init__(self, state: State[Any] | None) -> None:
        super().__init__(_SIGTERM_EXIT_CODE)
        self.state = self.loop_state = state

    def __str__(self) -> str:
        if self.state is None:
            return "SIGTERM ended the run before it had a state"
        return f"SIGTERM ended the run in epoch {self.state.epoch}, after step {self.state.step}"


_SIGTERM_EXIT_CODE = 128 + 15
"""As shells report a process that SIGTERM ended."""


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
