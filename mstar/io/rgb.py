"""Images of any kind as RGB: as a viewer shows them, on white."""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mstar.io.image import MAX_PIXELS

__all__ = ["open_image", "rgb_of", "shown", "to_rgb"]

_READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # others may run programs to be read
_DEEP = 65535  # white, in an image of 16 bits


def open_image(data: bytes) -> Image.Image:
    """The RGB image in a file; the first one of an animation.

    Raises:
        ValueError: it is none, is broken, or has more than `MAX_PIXELS` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_READABLE)
        _check_size(image)
        image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image has more than {MAX_PIXELS} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{len(data)} bytes that are no image") from error
    except (OSError, SyntaxError, EOFError, OverflowError) as error:
        raise ValueError(f"the image is broken: {error}") from error
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as a viewer shows it, in RGB: turned as its EXIF data say, on white.

    Raises:
        ValueError: it has no pixels, too many, or they cannot be read.
    """
    _check_size(image)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode == "I" or image.mode.startswith("I;16"):
            image = _shallow(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGB", image.size, (255, 255, 255))
            white.paste(image, mask=image.getchannel("A"))
            return white
        return image.convert("RGB")
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"the image is broken: {error}") from error


def rgb_of(value: Any) -> Image.Image:
    """The RGB image that was given: a path, bytes, `(filename, bytes)`, a PIL image or an array
    uint8 `[height, width]` or `[height, width, 3 or 4]`.

    Raises:
        ValueError: it is something else, or broken.
    """
    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, (str, PathLike)):
        try:
            return open_image(Path(value).read_bytes())
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from None
    if isinstance(value, (tuple, list)) and len(value) == 2:
        value = value[1]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return open_image(bytes(value))
    value = without_torch(value)
    if isinstance(value, np.ndarray):
        return to_rgb(_of_array(value))
    raise ValueError("must be a path, bytes, (filename, bytes), a PIL image or an array")


def without_torch(value: Any) -> Any:
    """A tensor as an array of numpy; what is no tensor, as it is.

    Raises:
        ValueError: numpy has no such tensors (bfloat16, sparse).
    """
    try:
        return value.detach().cpu().numpy() if hasattr(value, "detach") else value
    except (RuntimeError, TypeError):
        raise ValueError(f"must be dense and uint8, not {value.layout} {value.dtype}") from None


def _of_array(value: np.ndarray) -> Image.Image:
    flat = value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (3, 4))
    if value.dtype != np.uint8 or not flat or not value.size:
        raise ValueError("an array must be uint8 [height, width] or [height, width, 3 or 4]")
    return Image.fromarray(value)


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if not width * height:
        raise ValueError(f"the image has no pixels: {width} x {height}")
    if width * height > MAX_PIXELS:
        raise ValueError(f"the image has more than {MAX_PIXELS} pixels: {width} x {height}")


def _shallow(image: Image.Image) -> Image.Image:
    """8 bits of an image of more, of which those from files have 16."""
    values = np.asarray(image).astype(np.float64).clip(0, _DEEP)
    if image.mode == "I" and values.max() <= 255:
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray((values * (255 / _DEEP)).round().astype(np.uint8))


def shown(value: Any) -> str:
    """What was given, in a few words, for messages."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    if isinstance(value, (tuple, list)) and value:
        return str(value[0])[:80]
    shape = getattr(value, "shape", None)
    return str(value)[:80] if shape is None else f"array {tuple(shape)} {value.dtype}"
