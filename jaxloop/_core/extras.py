"""The packages that extras install, which are imported when they are used.

    library = import_extra("safetensors", what="save_weights", extra="safetensors")

Invariant: importing jaxloop imports none of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from jaxloop.errors import MissingExtraError


def import_extra(module: str, *, what: str, extra: str, package: str | None = None) -> Any:
    """Imports a module of a package that an extra installs.

    Args:
        module: The module.
        what: What needs it, for the error.
        extra: The extra of jaxloop.
        package: The package, if it has another name than the extra.

    Raises:
        MissingExtraError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the package is there, and lacks one of its own
        raise MissingExtraError(what, package or extra, extra) from error


def check_extra(module: str, *, what: str, extra: str) -> None:
    """Raises if a package is not installed. It is not imported, which may take long.

    Args:
        module: The module.
        what: What needs it, for the error.
        extra: The extra of jaxloop.

    Raises:
        MissingExtraError: The package is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(what, module, extra)
