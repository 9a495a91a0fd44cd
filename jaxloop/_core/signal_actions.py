"""Signal handlers as the operating system knows them.

    before = action(signal.SIGTERM)
    signal.signal(signal.SIGTERM, handler)
    ...
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    put_back(signal.SIGTERM, before)        # for a handler that was not set from Python

`signal.getsignal` only knows the handlers that were set from Python. It returns SIG_DFL for the
handler of `jax.distributed`, which is set from C++. The operating system knows both.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, TypeAlias

Action: TypeAlias = "ctypes.Array[ctypes.c_char]"
"""A ``struct sigaction``. On every system, its first field is the address of the handler."""

_MORE_THAN_ENOUGH = 512
"""In bytes. The struct has at most 152."""
_DEFAULT, _IGNORE = 0, 1


def _find() -> Any:
    try:
        return ctypes.CDLL(None).sigaction
    except (AttributeError, OSError, TypeError):  # Windows has no such function
        return None


_sigaction = _find()


def action(number: int) -> Action | None:
    """Returns the action of a signal, or None if the system does not tell."""
    if _sigaction is None:
        return None
    found = ctypes.create_string_buffer(_MORE_THAN_ENOUGH)
    return found if _sigaction(number, None, found) == 0 else None


def _address(one: Action) -> int:
    return int.from_bytes(one.raw[: ctypes.sizeof(ctypes.c_void_p)], sys.byteorder)


def is_ignored(one: Action | None) -> bool:
    """Returns whether an action ignores its signal."""
    return one is not None and _address(one) == _IGNORE


def put_back(number: int, before: Action | None) -> bool:
    """Puts back an action, if the one that is set from Python by now differs.

    Returns:
        Whether it was put back and calls a function. Python did not set that function.
    """
    now = action(number)
    if before is None or now is None or _address(now) == _address(before):
        return False
    _sigaction(number, before, None)
    return _address(before) not in (_DEFAULT, _IGNORE)
