"""Images as PNG files, without an imaging library.

    data = png(pixels)      # uint8, (height, width, channels)

Source: the PNG specification, third edition, https://www.w3.org/TR/png-3/.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

_COLOR_TYPES = {1: 0, 3: 2, 4: 6}
"""The color type by the number of channels: gray, RGB, RGB with alpha."""


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    """Returns a PNG file.

    Args:
        pixels: uint8, of shape ``(height, width, channels)`` with 1, 3 or 4 channels.

    Example:
        >>> import numpy as np
        >>> png(np.zeros((2, 2, 1), np.uint8))[:8]
        b'\\x89PNG\\r\\n\\x1a\\n'
    """
    height, width, channels = pixels.shape
    # Each row begins with the number of its filter. 0 is none.
    rows = np.zeros((height, 1 + width * channels), np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
