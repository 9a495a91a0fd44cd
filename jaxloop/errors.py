"""The errors of jaxloop: each says what, where, what came, and what to do.

    raise DataError("the data set is empty: it gave no batch", fix="pass at least one batch")

Every error derives from `JaxloopError` and from the nearest builtin, so that ``except ValueError``
and ``except jl.JaxloopError`` both catch it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JaxloopError(Exception):
    """The base of every error that jaxloop raises itself.

    Args:
        message: What happened, where, and what came.
        fix: What to do about it; printed on a line of its own.
    """

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message if fix is None else f"{message}\n  fix: {fix}")

    def __str__(self) -> str:
        # KeyError prints the repr of its argument; every error here prints its text.
        return str(self.args[0])


class ArgumentError(JaxloopError, ValueError):
    """An argument has the right type and a value that cannot be used."""


class ArgumentTypeError(JaxloopError, TypeError):
    """An argument is of a type that cannot be used."""


class UnknownNameError(ArgumentError):
    """A name that is none of the known ones (event, filter, metric, loss, optimizer, mode ...)."""


class DataError(JaxloopError, ValueError):
    """The data are empty, ran dry, or a batch is not what the step needs."""


class ShapeError(JaxloopError, ValueError):
    """An array has a shape that would give a wrong number."""


class StructureError(JaxloopError, TypeError):
    """The step state changed its structure, a shape or a dtype."""


class HandlerReturnError(JaxloopError, TypeError):
    """A handler returned something that is neither None nor (status, state)."""


class HaltError(JaxloopError, ValueError):
    """A handler asked to halt an epoch where no epoch is running."""


class MissingMetricError(JaxloopError, KeyError):
    """A metric that is not there was asked for."""


class ModelError(JaxloopError, TypeError):
    """A model is none of the known kinds, or its state does not fit it."""


class RecompilationError(JaxloopError, RuntimeError):
    """Under ``strict=True``, something would have compiled again in mid-run."""


class CheckpointError(JaxloopError, OSError):
    """A checkpoint cannot be written or read."""


class SerializationError(JaxloopError, ValueError):
    """Bytes are not a serialized state, are damaged, or do not fit ``like``."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """The error for a name that is none of ``known``, with the nearest known name.

    Example:
        >>> print(unknown_name("event", "epoch_complete", ["epoch_completed", "started"]))
        unknown event 'epoch_complete'; did you mean 'epoch_completed'?
          fix: use one of: epoch_completed, started
    """
    names = sorted(map(str, known))
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"unknown {kind} {name!r}{hint}", fix=f"use one of: {', '.join(names)}")


def missing_metric(who: str, name: str, known: Iterable[str]) -> MissingMetricError:
    """The error for a metric that is not there, listing those that are.

    Example:
        >>> print(missing_metric("early_stop", "los", ["loss"]))
        early_stop looks at the metric 'los', which is not there; there are: loss
          fix: attach the metric, or what adds it (such as validate), before
    """
    return MissingMetricError(
        f"{who} looks at the metric {name!r}, which is not there; there are: "
        f"{', '.join(sorted(known)) or 'none'}",
        fix="attach the metric, or what adds it (such as validate), before",
    )


def first_line(error: BaseException) -> str:
    """What an error says, in short; its class where it says nothing."""
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__
