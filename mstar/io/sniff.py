"""Tell images, audio, video and text apart by content first, by file name second."""

from __future__ import annotations

import codecs
from pathlib import PurePath

from mstar.errors import InvalidRequest

__all__ = ["EXTENSIONS", "kind_of"]

EXTENSIONS = {
    "image": ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"),
    "audio": ("wav", "mp3", "flac", "ogg", "oga", "opus", "m4a", "aac"),
    "video": ("mp4", "m4v", "avi", "mov", "mkv", "webm"),
    "text": ("txt", "md", "csv", "json", "jsonl", "html", "xml", "yaml", "yml", "py"),
}
_KIND_OF_EXTENSION = {ext: kind for kind, exts in EXTENSIONS.items() for ext in exts}

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"GIF87a", "image"),
    (b"GIF89a", "image"),
    (b"II*\0", "image"),
    (b"MM\0*", "image"),
    (b"fLaC", "audio"),
)
_RIFF = {b"WAVE": "audio", b"WEBP": "image", b"AVI ": "video"}
_AUDIO_BRANDS = (b"M4A ", b"M4B ", b"M4P ")
_IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)
_LOOK_AT = 4096


def kind_of(data: bytes, name: str | None = None) -> str | None:
    """`"image"`, `"audio"`, `"video"` or `"text"`, or `None` where neither content nor name tells.

    Clear content wins over a missing or unknown extension. MP4, Matroska and Ogg can hold sound
    alone or pictures too: there the extension decides, if it is one of the two.

    Args:
        data: the file, or at least its first 4 KiB.
        name: the file name, if there is one.

    Raises:
        InvalidRequest: the content is clearly of one kind and the extension names another.
    """
    extension = PurePath(name).suffix.lower().removeprefix(".") if name else ""
    by_name = _KIND_OF_EXTENSION.get(extension)
    possible = _kinds_of_content(bytes(data[:_LOOK_AT]))
    if not possible:
        return by_name
    if by_name in possible:
        return by_name
    if by_name is None:
        return possible[0]
    raise InvalidRequest("file", name, f"is named .{extension} ({by_name}) but holds {possible[0]}")


def _kinds_of_content(head: bytes) -> tuple[str, ...]:
    """The kinds that the content can be, likeliest first; empty when it does not tell."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return (kind,)
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] in _RIFF:
        return (_RIFF[head[8:12]],)
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES:
        return ("image",)
    if head[:2] == b"\0\0" and head[4:8] == b"ftyp":
        return _kinds_of_brand(head[8:12])
    if head[:1] == b"\0" and head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip"):
        return ("video",)
    if head.startswith(b"\x1aE\xdf\xa3"):
        return ("video", "audio")
    if head.startswith(b"OggS"):
        return ("video",) if b"\x80theora" in head else ("audio", "video")
    if (head[:3] == b"ID3" and head[3:4] in (b"\2", b"\3", b"\4")) or _is_mpeg_audio(head):
        return ("audio",)
    return ("text",) if _is_text(head) else ()


def _kinds_of_brand(brand: bytes) -> tuple[str, ...]:
    if brand in _AUDIO_BRANDS:
        return ("audio",)
    return ("image",) if brand in _IMAGE_BRANDS else ("video", "audio")


def _is_mpeg_audio(head: bytes) -> bool:
    """Whether an MPEG layer III frame (MP3) or an ADTS frame (AAC) starts here.

    MP3: 11 sync bits, version, layer, ..., bit-rate index, sampling-rate index (ISO 11172-3,
    2.4.1.3). ADTS: 12 sync bits, layer 0, sampling-rate index below 13 (ISO 14496-3, 1.A.2.2).
    """
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    if layer == 0:
        return head[1] & 0xF0 == 0xF0 and head[2] >> 2 & 15 < 13
    return layer == 1 and version != 1 and head[2] >> 4 not in (0, 15) and head[2] >> 2 & 3 != 3


def _is_text(head: bytes) -> bool:
    """Whether this is the start of UTF-8 text without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(text) and all(c >= " " or c in "\t\n\r\f\x1b" for c in text)
