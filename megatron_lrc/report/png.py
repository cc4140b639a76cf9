"""A palette image as PNG bytes: what a heat map needs of a drawing library."""

import struct
import zlib
from collections.abc import Sequence

#: Colours from low to high, perceptually even; between them colours are mixed. For value levels 0 to LEVELS - 1.
ANCHORS = ((36, 23, 82), (54, 72, 140), (40, 118, 142), (34, 160, 132), (112, 196, 93), (222, 217, 66), (253, 244, 190))
LEVELS = 255
NOTHING = 255  # transparent


def palette() -> list[tuple[int, int, int]]:
    """A colour for each level."""
    colors = []
    for level in range(LEVELS):
        place = level / (LEVELS - 1) * (len(ANCHORS) - 1)
        below = min(int(place), len(ANCHORS) - 2)
        mix = place - below
        pair = zip(ANCHORS[below], ANCHORS[below + 1], strict=True)
        colors.append(tuple(round(low + mix * (high - low)) for low, high in pair))
    return colors  # type: ignore[return-value]


def encode(rows: Sequence[bytes]) -> bytes:
    """PNG of the rows of levels, top first, all of one length; NOTHING is transparent."""
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)  # 8 bits each, from a palette
    colors = b"".join(bytes(color) for color in palette()) + b"\0\0\0"
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", colors),
        (b"tRNS", b"\xff" * LEVELS + b"\0"),
        (b"IDAT", pixels),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
