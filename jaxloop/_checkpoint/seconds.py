"""The seconds of epochs and sessions in a record.

    record["times"] = pack_times(state.lazy_times, packer)
    record["sessions"] = pack_sessions(state.lazy_sessions, packer)

Invariant: what a stranger may have written is checked before it becomes a number of seconds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxloop._checkpoint.packing import Packer
from jaxloop._checkpoint.schema import hints_of, is_whole, malformed, matches
from jaxloop._checkpoint.unpacking import Unpacker
from jaxloop._core.lazy import EpochRecords
from jaxloop._core.sessions import Session, Sessions
from jaxloop._core.times import EpochTime


def pack_times(times: EpochRecords, packer: Packer) -> Any:
    """Converts ``{epoch: seconds}`` to an array with a row per epoch."""
    rows = [[epoch, *EpochTime.of(seconds).parts] for epoch, seconds in times.get().items()]
    return packer.array(np.array(rows, np.float64))


def unpack_times(kept: Any, unpacker: Unpacker) -> EpochRecords:
    """Does the opposite of `pack_times`. Rows of earlier formats have fewer parts."""
    rows = unpacker.unpack(kept).tolist()
    times = {int(epoch): EpochTime(*parts) for epoch, *parts in rows}
    if not all(map(is_whole, times)):
        raise malformed("times", kept)
    return EpochRecords.of(times)


def pack_sessions(sessions: Sessions, packer: Packer) -> Any:
    """Converts sessions to plain dicts."""
    return [dataclasses.asdict(one) for one in sessions.get()]


def unpack_sessions(kept: Any, unpacker: Unpacker) -> Sessions:
    """Does the opposite of `pack_sessions`."""
    if not isinstance(kept, list) or not all(map(_is_session, kept)):
        raise malformed("sessions", kept)
    return Sessions(tuple(Session(**one) for one in kept))


def _is_session(kept: Any) -> bool:
    hints = hints_of(Session)
    if not isinstance(kept, dict) or kept.keys() != hints.keys():
        return False
    seconds = kept["by_handler"]
    return (
        isinstance(seconds, dict)
        and all(matches(one, float) for one in seconds.values())
        and all(matches(kept[name], hints[name]) for name in hints if name != "by_handler")
    )
