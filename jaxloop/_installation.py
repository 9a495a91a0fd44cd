"""Detects files of another distribution in this package's folder.

    check_no_foreign_files(Path(jaxloop.__file__).parent)

Invariant: this file imports only the standard library, and the check costs a few microseconds.
"""

from __future__ import annotations

import os
from pathlib import Path

FOREIGN_FILES = ("actions.py",)
"""Modules that google/jaxloop installs and functional-jaxloop does not."""


def check_no_foreign_files(folder: Path) -> None:
    """Raises if another distribution has installed its files into the ``jaxloop`` package.

    PyPI's distribution ``jaxloop`` (google/jaxloop) also installs a package named ``jaxloop``.
    pip does not detect the conflict, and each distribution overwrites the other's
    ``__init__.py``.

    Args:
        folder: The folder of the ``jaxloop`` package.

    Raises:
        ImportError: A file of the other distribution is in the folder.

    Example:
        >>> import jaxloop
        >>> check_no_foreign_files(Path(jaxloop.__file__).parent)
    """
    for name in FOREIGN_FILES:
        # os.path is several times faster here than Path.
        path = os.path.join(folder, name)
        if os.path.exists(path):
            raise ImportError(
                f"two distributions are installed in {str(folder)!r}: functional-jaxloop (this "
                f"one) and jaxloop (google/jaxloop, which installed {name!r}); "
                "they cannot be used together\n"
                "  fix: run `pip uninstall -y jaxloop functional-jaxloop`, then "
                "`pip install functional-jaxloop`."
            )
