"""Image files: what they hold, whether they are whole, and the same picture in another format."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from mstar.errors import InvalidRequest, RequestFailed
from mstar.io.sniff import kind_of

__all__ = ["FORMATS", "MAX_PIXELS", "Picture", "read_picture", "transcode"]

# Formats that pictures are handed out in -> their content types.
FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MAX_PIXELS = 2**26  # of one upload: 192 MiB once it is decoded
_READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION = 0x0112  # EXIF tag; from 5 on the picture lies on its side
_FULL_COLOUR = 95  # JPEG quality from which colours keep their full resolution


@dataclass(frozen=True)
class Picture:
    """What is known of an image file: `format` in lower case, size in pixels as it is looked at
    (EXIF orientation applied), and whether pixels can be transparent."""

    format: str
    width: int
    height: int
    transparent: bool


def read_picture(field: str, data: bytes, max_pixels: int = MAX_PIXELS) -> Picture:
    """Look at an image file, and decode it once to be sure that it is whole.

    Args:
        field: where it came from, for messages.
        data: the file; of an animation, the first picture counts.
        max_pixels: refused beyond that, before anything is decoded.

    Raises:
        InvalidRequest: it is no image, a broken one, or too large.
    """
    shown = f"{len(data)} bytes"
    try:
        with Image.open(io.BytesIO(data), formats=_READABLE) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _too_large(field, f"{width}x{height}", max_pixels)
            image.load()
            if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
                width, height = height, width
            format = (image.format or "").lower()
            return Picture(format, width, height, image.has_transparency_data)
    except InvalidRequest:
        raise
    except Image.DecompressionBombError:
        raise _too_large(field, shown, max_pixels) from None
    except Image.UnidentifiedImageError:
        if kind_of(data) == "image":
            raise InvalidRequest(field, shown, "the image is broken, or of a rare kind") from None
        kinds = ", ".join(name.lower() for name in _READABLE)
        raise InvalidRequest(field, shown, f"is not an image; images are {kinds}") from None
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise InvalidRequest(field, shown, f"the image is broken: {error}"[:200]) from None


def transcode(png: bytes, format: str, quality: int = 100) -> tuple[bytes, int, int]:
    """A model's PNG as a file of another format, with its width and height in pixels.

    Args:
        png: the file; it is handed back as it is if `format` is png.
        format: one of `FORMATS`.
        quality: 0 to 100, of JPEG and WebP.

    Raises:
        RequestFailed: it is not a whole PNG.
    """
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            width, height = image.size
            if format == "png":
                return png, width, height
            return _encoded(image, format, quality), width, height
    except (OSError, SyntaxError, ValueError) as error:
        raise RequestFailed(f"the model made no readable image: {error}"[:200]) from None


def _encoded(image: Image.Image, format: str, quality: int) -> bytes:
    clear = image.has_transparency_data
    out = io.BytesIO()
    if format == "webp":
        image.convert("RGBA" if clear else "RGB").save(out, "WEBP", quality=quality)
        return out.getvalue()
    if clear:  # JPEG has no transparency: what is seen through is white
        whole = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), whole)
    options = {"subsampling": 0} if quality >= _FULL_COLOUR else {}
    image.convert("RGB").save(out, "JPEG", quality=max(1, quality), **options)
    return out.getvalue()


def _too_large(field: str, shown: str, max_pixels: int) -> InvalidRequest:
    return InvalidRequest(field, shown, f"the image has more than {max_pixels} pixels")
