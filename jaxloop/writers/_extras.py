"""The packages behind writers, which are imported when a run opens a writer.

    mlflow = import_extra("mlflow", extra="mlflow", package="mlflow-skinny")

Invariant: importing `jaxloop.writers` imports none of them.
"""

from __future__ import annotations

import importlib
from typing import Any

from jaxloop.errors import MissingExtraError


def import_extra(module: str, *, extra: str, package: str) -> Any:
    """Imports a module of a package that an extra installs.

    Raises:
        MissingExtraError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the package is there, and lacks one of its own
        raise MissingExtraError(f"writers.{extra}", package, extra) from error
