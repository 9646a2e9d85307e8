"""Videos of any kind as images: files, animations, sequences of images, arrays.

Nothing is decoded before it is asked for, and one frame at a time.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mstar.errors import InvalidRequest
from mstar.io.image import MAX_PIXELS
from mstar.io.probe import Unreadable, open_container, probe_image, probe_video
from mstar.io.rgb import rgb_of, to_rgb, without_torch
from mstar.io.sniff import kind_of

__all__ = ["Video", "open_video", "read_bytes", "video_of_file"]

_MOST_FRAMES = 100_000  # of an animation


@dataclass(frozen=True, eq=False)
class Video:
    """Frames that can be had.

    Args:
        count: how many there are, or should be: a file that is cut off has fewer.
        at: the RGB images at some places.
        fps: frames of a second, where it is known.
    """

    count: int
    at: Callable[[Sequence[int]], Iterator[Image.Image]]
    fps: float | None = None

    def images(self, places: Sequence[int] | None = None) -> Iterator[Image.Image]:
        """The frames at `places`, which rise; all of them if left out.

        Raises:
            ValueError: one is broken, or has too many pixels.
        """
        places = range(self.count) if places is None else places
        return self.at(places) if places else iter(())


def open_video(value: Any, longest: float = 3600.0) -> Video:
    """A video, whatever it was given as.

    Args:
        value: a file (a path, bytes or `(filename, bytes)`) of a video or of an image, animated or
            not; a PIL image; a list of images; an array uint8 `[times, height, width, 3]`.
        longest: seconds, refused beyond that.

    Raises:
        ValueError: it is something else, or broken; says what, or what to install.
    """
    value = without_torch(value)
    if isinstance(value, np.ndarray) and value.ndim != 3:
        return _of_array(value)
    if isinstance(value, (Image.Image, np.ndarray)):
        return _of_images([value])
    if isinstance(value, list):
        return _of_images(value)
    data = read_bytes(value)
    name = value[0] if isinstance(value, tuple) else value
    try:
        kind = kind_of(data, name if isinstance(name, str) else None)
    except InvalidRequest as error:
        raise ValueError(error.allowed) from None
    return _of_animation(data) if kind == "image" else video_of_file(data, longest)


def read_bytes(value: Any) -> bytes:
    """The bytes of a file: of a path, bytes, or `(filename, bytes)`.

    Raises:
        ValueError: it is something else, or cannot be read.
    """
    if isinstance(value, (str, PathLike)):
        try:
            return Path(value).read_bytes()
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from None
    if isinstance(value, (tuple, list)) and len(value) == 2:
        value = value[1]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise ValueError("must be a path, bytes, (filename, bytes) or an array of frames")


def video_of_file(data: bytes, longest: float = 3600.0) -> Video:
    """The video in a file that FFmpeg knows.

    Its frames end early where it does.

    Raises:
        ValueError: see `open_video`.
    """
    with _decoding():
        stated = probe_video(data, longest)
        if stated.seconds > longest:
            raise ValueError(f"it is longer than {longest:g} seconds")
        if stated.width * stated.height > MAX_PIXELS:
            raise ValueError(f"a frame has more than {MAX_PIXELS} pixels")
        with open_container(data) as file:
            stream = file.streams.video[0]
            count = sum(packet.size > 0 for packet in file.demux(stream))
            fps = float(stream.average_rate or 0) or count / max(stated.seconds, 1e-3)
    return Video(count, lambda places: _decoded(data, places), min(max(fps, 1e-3), 1000.0))


def _decoded(data: bytes, places: Sequence[int]) -> Iterator[Image.Image]:
    """Frames as a viewer shows them."""
    import av

    wanted = set(places)
    try:
        with open_container(data) as file:
            stream = file.streams.video[0]
            stream.thread_type = "AUTO"
            for index, frame in enumerate(file.decode(stream)):
                if frame.width * frame.height > MAX_PIXELS:
                    raise ValueError(f"a frame has more than {MAX_PIXELS} pixels")
                if index in wanted:
                    image = frame.to_image()
                    turn = getattr(frame, "rotation", 0)
                    yield image.rotate(turn, expand=True) if turn else image
                if index >= places[-1]:
                    return
    except av.FFmpegError:
        return  # what there is can be seen


def _of_animation(data: bytes) -> Video:
    """A GIF, an animated PNG or WebP; anything else of Pillow's is one frame."""
    try:
        probed = probe_image(data, _MOST_FRAMES)
    except Unreadable as error:
        raise ValueError(str(error)) from None
    if probed.frames > _MOST_FRAMES:
        raise ValueError(f"it has more than {_MOST_FRAMES} frames")
    if probed.width * probed.height > MAX_PIXELS:
        raise ValueError(f"a frame has more than {MAX_PIXELS} pixels")
    if probed.frames == 1:
        return _of_images([data])

    def at(places: Sequence[int]) -> Iterator[Image.Image]:
        try:
            with Image.open(io.BytesIO(data)) as image:
                for place in places:
                    image.seek(place)
                    yield to_rgb(image.copy())
        except (OSError, SyntaxError, EOFError) as error:
            raise ValueError(f"the image is broken: {error}") from error

    return Video(probed.frames, at)


def _of_images(values: Sequence[Any]) -> Video:
    return Video(len(values), lambda places: (rgb_of(values[place]) for place in places))


def _of_array(value: np.ndarray) -> Video:
    if value.dtype != np.uint8 or value.ndim != 4 or value.shape[3] != 3:
        raise ValueError("an array must be uint8 [times, height, width, 3]")
    if not value[:1].size and len(value):
        raise ValueError("its frames have no pixels")
    return Video(len(value), lambda places: (Image.fromarray(value[place]) for place in places))


@contextmanager
def _decoding() -> Iterator[None]:
    """Errors of FFmpeg, and its absence, in words."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        raise ValueError("videos need PyAV: pip install mstar[video]") from None
    except Unreadable as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "av":
            raise
        raise ValueError(f"it is broken: {error}") from None
