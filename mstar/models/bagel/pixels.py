"""Images to what the networks take, and back: colours, sizes, patches, files."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mstar.io.image import MAX_PIXELS
from mstar.models.bagel.resize import ResizeRule, new_size

__all__ = [
    "open_image",
    "patchify",
    "resized",
    "to_pixels",
    "to_png",
    "to_rgb",
    "to_uint8",
    "unpatchify",
]

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


def resized(image: Image.Image, rule: ResizeRule) -> Image.Image:
    """An RGB image in the size that the rule asks for (bicubic, antialiased)."""
    size = new_size(rule, *image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def to_pixels(image: Image.Image) -> Tensor:
    """Float32 `[3, height, width]`, -1 to 1, of an RGB image."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return pixels.contiguous().float().div_(255).sub_(0.5).div_(0.5)


def patchify(x: Tensor, size: int) -> Tensor:
    """Patches `[..., rows * columns, size * size * channels]` of `[..., channels, height, width]`.

    Row by row; in a patch the channel runs fastest, then the column.
    """
    patches = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # c, rows, a, columns, b
    patches = patches.movedim((-4, -2, -3, -1), (-5, -4, -3, -2))
    return patches.flatten(-3).flatten(-3, -2)


def unpatchify(patches: Tensor, rows: int, columns: int, size: int) -> Tensor:
    """`[..., channels, rows * size, columns * size]`: the inverse of `patchify`."""
    x = patches.unflatten(-1, (size, size, -1)).unflatten(-4, (rows, columns))
    x = x.movedim((-1, -5, -3, -4, -2), (-5, -4, -3, -2, -1))
    return x.flatten(-2).flatten(-3, -2)


def to_uint8(pixels: Tensor) -> Tensor:
    """Bytes `[..., height, width, 3]` of `[..., 3, height, width]`, -1 to 1; fractions are cut."""
    levels = (pixels * 0.5 + 0.5).clamp(0, 1) * 255
    return levels.to(torch.uint8).movedim(-3, -1).contiguous()


def to_png(levels: Tensor) -> bytes:
    """A PNG file of bytes `[height, width, 3]`."""
    out = io.BytesIO()
    Image.fromarray(levels.cpu().numpy()).save(out, "PNG", compress_level=1)
    return out.getvalue()


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
