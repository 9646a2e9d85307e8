"""Small files that state enormous things, for tests of limits."""

from __future__ import annotations

import struct
import zlib


def png(width: int, height: int) -> bytes:
    """A PNG with a true header and next to no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pieces = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in pieces
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def gif(width: int, height: int, frames: int = 1, picture: tuple[int, int] | None = None) -> bytes:
    """A GIF whose pictures hold next to nothing."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    size = picture or (width, height)
    one = b"," + struct.pack("<HHHHB", 0, 0, *size, 0) + b"\2\2\x4c\1\0"
    return head + one * frames + b";"


def bmp(width: int, height: int) -> bytes:
    """A BMP without its pixels."""
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6)


def tiff(width: int, height: int, then: tuple[int, int] | None = None) -> bytes:
    """A TIFF of one or two pages, without pixels."""
    pages = [(width, height), *([then] if then else [])]
    data = b"II*\0" + struct.pack("<I", 8)
    for index, size in enumerate(pages):
        tags = [(256, size[0]), (257, size[1]), (258, 8), (259, 1), (262, 1)]
        tags += [(273, 8), (277, 1), (278, size[1]), (279, 8)]
        data += struct.pack("<H", len(tags))
        data += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        data += struct.pack("<I", len(data) + 4 if index + 1 < len(pages) else 0)
    return data


def webp(width: int, height: int) -> bytes:
    """An animated WebP that is only a canvas."""
    canvas = bytes([2, 0, 0, 0]) + (width - 1).to_bytes(3, "little")
    canvas += (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", len(canvas)) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def wav(samples: int, there: int = 100) -> bytes:
    """A mono WAV that states more samples than it has."""
    form = struct.pack("<HHIIHH", 1, 1, 24000, 48000, 2, 16)
    data = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", 2 * samples)
    return b"RIFF" + struct.pack("<I", 36 + 2 * samples) + data + bytes(2 * there)


def box(kind: bytes, data: bytes) -> bytes:
    """One box of an MP4."""
    return struct.pack(">I", 8 + len(data)) + kind + data


def mp4(
    seconds: int = 1,
    samples: int = 0,
    size: int = 1000,
    fragment: int = 0,
    entries: int = 0,
    per_chunk: int = 0,
) -> bytes:
    """The boxes of an MP4 with one track, and nothing behind them; plain sound with `per_chunk`."""
    times = struct.pack(">IIIII", 0, 0, 0, 10, 10 * seconds)
    sizes = box(b"stsz", struct.pack(">III", 0, size, samples))
    durations = box(b"stts", struct.pack(">II", 0, entries))
    kind = b"vide"
    if per_chunk:
        durations = box(b"stts", struct.pack(">IIII", 0, 1, samples, 1))
        sizes += box(b"stsc", struct.pack(">IIIII", 0, 1, 1, per_chunk, 1))
        sizes += box(b"stco", struct.pack(">II", 0, 100) + bytes(400))
        kind = b"soun"
    table = box(b"minf", box(b"stbl", durations + sizes))
    handler = box(b"hdlr", bytes(8) + kind + bytes(12))
    track = box(b"trak", box(b"mdia", box(b"mdhd", times + bytes(4)) + handler + table))
    moov = box(b"moov", box(b"mvhd", times + bytes(80)) + track)
    run = box(b"trun", struct.pack(">III", 0, fragment, 0))
    moof = box(b"moof", box(b"traf", run)) if fragment else b""
    return box(b"ftyp", b"isom\0\0\0\0isom") + moov + moof
