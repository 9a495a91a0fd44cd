"""Records as text: reads and checks what a stranger may have written.

    record = load(folder / "meta" / "metadata")     # from a folder of checkpoints
    record = parse(header)                          # from bytes

The size of a record is bounded before it is read, and each of its fields is checked before it is
used.
"""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any

from jaxloop._checkpoint.record import CODECS, FORMAT, checksum
from jaxloop._checkpoint.schema import (
    MOST_BYTES,
    check_digested,
    check_folder_fields,
    check_format_field,
    check_record,
    is_too_large,
    too_large,
)
from jaxloop.errors import DamagedError, first_line

_COPY = "use another copy"


def parse(raw: bytes, *, checksummed: bool = False) -> dict[str, Any]:
    """Returns a record from its text, after checking each of its fields.

    Only the format of a record of a later jaxloop is checked, because the rest may have changed.

    Args:
        raw: The text.
        checksummed: Whether the record has its own checksum.

    Raises:
        DamagedError: The text is not a record.
    """
    if is_too_large(raw):
        raise DamagedError(too_large(len(raw)), fix=_COPY)
    try:
        record = json.loads(raw.decode())
        right = not checksummed or (
            isinstance(record, dict) and record.get("sha256") == checksum(record)
        )
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"its record is not JSON: {first_line(error)}", fix=_COPY) from error
    if not right:
        raise DamagedError("its record was altered: the checksum differs", fix=_COPY)
    check_format_field(record)
    if record["format"] <= FORMAT:
        check_record(record, CODECS)
    known: dict[str, Any] = record
    return known


def load(file: Path) -> dict[str, Any]:
    """Returns the record in a file of a folder of checkpoints.

    Raises:
        OSError: The file cannot be read.
        DamagedError: The file is not a record.
    """
    try:
        status = file.stat()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise DamagedError("its record is a link to itself", fix=_COPY) from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
        raise DamagedError("its record is not a file", fix=_COPY)
    if status.st_size > MOST_BYTES:
        raise DamagedError(too_large(status.st_size), fix=_COPY)
    with file.open("rb") as opened:
        raw = opened.read(status.st_size + 1)
    record = parse(raw, checksummed=True)
    check_folder_fields(record)
    if record["format"] <= FORMAT:
        check_digested(record)
    return record
