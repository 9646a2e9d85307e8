"""Media are refused by their headers, before memory or time is spent on decoding them."""

from __future__ import annotations

from mstar.errors import InvalidRequest
from mstar.http.allowance import allowance_of
from mstar.http.settings import Settings
from mstar.io.probe import Probed, Unreadable, probe_audio, probe_image, probe_video
from mstar.io.sniff import kind_of

__all__ = ["check_media", "moves"]

_MOST_FRAMES = 1024  # of an animated image
_RATE, _CHANNELS = 96_000, 2  # the most samples are those of the longest sound at this rate


def check_media(settings: Settings, kind: str, data: bytes, field: str) -> None:
    """Raise if media are unreadable or too large, also together with others of the same request;
    takes milliseconds, so not on the event loop.

    Args:
        settings: with the limits.
        kind: `image`, `audio` or `video`.
        data: the file.
        field: to name in errors.

    Raises:
        InvalidRequest: says what is wrong, or what the limit is.
    """
    try:
        taken = _CHECKS[kind](settings, data)
        if words := allowance_of(settings).decode(*taken):
            raise _TooLarge(words)
    except ModuleNotFoundError:
        pass  # without PyAV such a file cannot be decoded either: that says what to install
    except (Unreadable, _TooLarge) as error:
        raise InvalidRequest(field, kind, str(error)) from None


def moves(image: bytes) -> bool:
    """Whether an image, such as a GIF, has several frames."""
    try:
        return probe_image(image, 1).frames > 1
    except Unreadable:
        return False


class _TooLarge(Exception):
    pass


def _check_image(settings: Settings, data: bytes) -> tuple[str, float]:
    found = probe_image(data, _MOST_FRAMES)
    _check_pixels(settings, found, "image")
    if found.frames > _MOST_FRAMES:
        raise _TooLarge(f"the image has more than {_MOST_FRAMES} frames")
    return "pixels", found.width * found.height


def _check_audio(settings: Settings, data: bytes) -> tuple[str, float]:
    longest = settings.max_audio_seconds
    found = probe_audio(data, longest)
    _check_seconds(found, longest, "sound")
    if found.frames * found.channels > longest * _RATE * _CHANNELS:
        raise _TooLarge(f"the sound has more samples than {longest:g} seconds of stereo")
    return "seconds of sound", found.seconds


def _check_video(settings: Settings, data: bytes) -> tuple[str, float]:
    longest, most = settings.max_video_seconds, settings.max_video_frames
    if kind_of(data) == "image":  # such as GIF
        most = min(most, _MOST_FRAMES)
        found = probe_image(data, most)
        if found.frames < 2:
            raise Unreadable("the data holds image, and one that does not move")
    else:
        found = probe_video(data, longest)
    _check_seconds(found, longest, "video")
    _check_pixels(settings, found, "video")
    if found.frames > most:
        raise _TooLarge(f"the video has {found.frames} frames; at most {most}")
    return "frames of video", found.frames


def _check_pixels(settings: Settings, found: Probed, what: str) -> None:
    if found.width * found.height > settings.max_pixels:
        raise _TooLarge(f"the {what} has more than {settings.max_pixels} pixels")


def _check_seconds(found: Probed, longest: float, what: str) -> None:
    if found.seconds > longest:
        raise _TooLarge(f"the {what} is longer than {longest:g} seconds")


_CHECKS = {"image": _check_image, "audio": _check_audio, "video": _check_video}
