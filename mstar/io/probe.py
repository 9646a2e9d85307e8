"""What media files say of their size, read from their headers: nothing is decoded.

Headers can lie, in both directions. What lies upwards is caught here, before memory is spent on
it; whoever decodes must stop at the stated size.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

from mstar.io.isobmff import is_isobmff, walk_isobmff

__all__ = ["Probed", "Unreadable", "open_container", "probe_audio", "probe_image", "probe_video"]

IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# FFmpeg tells formats by content. Playlists would make it open other files and addresses, so only
# these containers are tried, and nothing but the given bytes can be opened.
_CONTAINERS = "mov,mp4,matroska,webm,avi,ogg,mp3,aac,flac,wav,mpegts,mpeg"
_SAFE = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none", "probesize": "1000000"}
_ENDLESS = 0x7FFFF000  # from here on, the size in a WAV means that it was not known
_MOST_PACKETS = 400_000


class Unreadable(ValueError):
    """The header is broken, or of no known format; says which."""


@dataclass(frozen=True)
class Probed:
    """What a header states.

    Args:
        width, height: pixels.
        frames: pictures; of sound, samples per channel. Counted up to what was asked for.
        seconds: of sound and video.
        channels: of sound.
    """

    width: int = 0
    height: int = 0
    frames: int = 0
    seconds: float = 0.0
    channels: int = 0


def probe_image(data: bytes, most_frames: int = 1024) -> Probed:
    """Size in pixels, and number of pictures up to one beyond `most_frames`.

    Raises:
        Unreadable: it is no image of a known format.
    """
    from PIL import Image

    if data[:4] == b"RIFF" and data[12:16] == b"VP8X" and len(data) >= 30:
        # libwebp makes room for the canvas when the file is opened, so it is looked at before
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        if width * height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
            return Probed(width, height, 1)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _gif(data, most_frames)
    try:
        with Image.open(io.BytesIO(data), formats=IMAGES) as image:
            size, frames = image.size, 1
            if image.format == "TIFF":
                while frames <= most_frames and _has_page(image, frames):
                    size = (max(size[0], image.width), max(size[1], image.height))
                    frames += 1
            else:
                frames = min(getattr(image, "n_frames", 1), most_frames + 1)
            return Probed(*size, frames)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return Probed(most + 1, 1, 1)  # Pillow does not say how many there are
    except Image.UnidentifiedImageError:
        raise Unreadable("is no image, or its header is broken") from None
    except Exception:  # headers that are broken lead Pillow to all kinds of errors
        raise Unreadable("the header of the image is broken") from None


def _has_page(image: Any, index: int) -> bool:
    try:
        image.seek(index)
    except EOFError:
        return False
    return True


def _gif(data: bytes, most_frames: int) -> Probed:
    """Walks the blocks (GIF89a, appendix A); Pillow would decode each picture to get to the next.

    The sizes of the pictures count, too, for they can be larger than the screen that they are on.
    """

    def table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    def behind_blocks(at: int) -> int:
        while data[at]:
            at += data[at] + 1
        return at + 1

    def number(at: int) -> int:
        return int.from_bytes(data[at : at + 2], "little")

    width, height, frames = number(6), number(8), 0
    try:
        at = 13 + table(data[10])
        while frames <= most_frames and data[at] != 0x3B:
            if data[at] == 0x21:  # an extension
                at = behind_blocks(at + 2)
            elif data[at] == 0x2C:  # a picture
                frames += 1
                width = max(width, number(at + 1) + number(at + 5))
                height = max(height, number(at + 3) + number(at + 7))
                at = behind_blocks(at + 11 + table(data[at + 9]))
            else:
                break
    except IndexError:
        pass  # it ends early; what is there can be shown
    if not frames:
        raise Unreadable("the image is cut off: it holds no picture")
    return Probed(width, height, frames)


def probe_audio(data: bytes, most_seconds: float = 3600.0) -> Probed:
    """Length, samples and channels.

    What does not state its length is counted, up to `most_seconds`.

    Raises:
        Unreadable: the header is broken, or says that there is more than there is.
        ModuleNotFoundError: only PyAV could read it, and it is not installed.
    """
    if data[:4] == b"RIFF":
        _check_wav(data)
    if is_isobmff(data):
        return _contained(data, "audio", most_seconds)
    try:
        import soundfile
    except OSError:  # there is no libsndfile
        return _contained(data, "audio", most_seconds)
    try:
        found = soundfile.info(io.BytesIO(data))
        if not found.samplerate > 0 or not found.channels > 0 or found.frames < 0:
            raise Unreadable("the header of the sound is broken")
        if found.frames < 2**62:
            seconds = found.frames / found.samplerate
            return Probed(frames=found.frames, seconds=seconds, channels=found.channels)
    except (soundfile.SoundFileError, TypeError):
        pass
    return _contained(data, "audio", most_seconds)


def _check_wav(data: bytes) -> None:
    """Raise if the samples are cut off. Lengths that were not known while it was written pass."""
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            if size < _ENDLESS and size > len(data) - at - 8:
                there = len(data) - at - 8
                raise Unreadable(f"is cut off: it states {size} bytes of samples and has {there}")
            return
        at += 8 + size + size % 2
    raise Unreadable("is cut off: it has no samples")


def probe_video(data: bytes, most_seconds: float = 3600.0) -> Probed:
    """Size of a frame, number of frames, and length.

    What does not state its length is counted, up to `most_seconds`.

    Raises:
        Unreadable: the header is broken.
        ModuleNotFoundError: only PyAV could read it, and it is not installed.
    """
    return _contained(data, "video", most_seconds)


def open_container(data: bytes) -> Any:
    """`av.open` on bytes that came from anywhere: no playlists, no other files or addresses.

    Raises:
        ModuleNotFoundError: PyAV is not installed. av.FFmpegError: it cannot be read.
    """
    import av

    options = {"container_options": dict(_SAFE)}
    if int(av.__version__.split(".")[0]) < 19:  # later ones never fail on a title in latin-1
        options["metadata_errors"] = "replace"
    return av.open(io.BytesIO(data), **options)


def _contained(data: bytes, kind: str, most_seconds: float) -> Probed:
    """Sound or video in a container that FFmpeg knows."""
    stated = walk_isobmff(data) if is_isobmff(data) else None
    if stated is not None and (stated.broken or stated.seconds > most_seconds):
        if stated.broken:
            raise Unreadable(stated.broken)
        return Probed(frames=stated.samples, seconds=stated.seconds)  # FFmpeg needs not look
    import av

    try:
        with open_container(data) as file:
            streams = file.streams.video if kind == "video" else file.streams.audio
            if not streams:
                raise Unreadable(f"holds no {kind}")
            stream = streams[0]
            if stream.codec_context is None:
                raise Unreadable(f"holds {kind} in a coding that is not known")
            seconds = stated.seconds if stated else 0.0
            if stream.duration is not None and stream.time_base is not None:
                seconds = max(seconds, float(stream.duration * stream.time_base))
            if file.duration is not None:
                seconds = max(seconds, file.duration / av.time_base)
            frames = stream.frames
            if seconds <= 0:
                frames, seconds = _counted(file, stream, most_seconds)
            if kind == "audio":
                rate, channels = stream.rate or 0, stream.codec_context.channels
                if not rate or not channels:
                    raise Unreadable("the header of the sound is broken")
                return Probed(frames=round(seconds * rate), seconds=seconds, channels=channels)
            if not stream.width or not stream.height:
                raise Unreadable("the header of the video is broken")
            frames = max(frames, round(seconds * float(stream.average_rate or 0)))
            return Probed(stream.width, stream.height, frames, seconds)
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"is no {kind}, or its header is broken") from None


def _counted(file: Any, stream: Any, most_seconds: float) -> tuple[int, float]:
    """Packets and their seconds, until the end or the limit."""
    count, ticks, base = 0, 0, float(stream.time_base or 0)
    for packet in file.demux(stream):
        if packet.size:
            count += 1
            ticks += packet.duration or 0
            if ticks * base > most_seconds:
                break
            if count > _MOST_PACKETS:
                raise Unreadable("has too many parts, and does not state its length")
    if not ticks or not base:
        raise Unreadable("does not state its length")
    return count, ticks * base
