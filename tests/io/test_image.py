"""Image files: looked at, and written in other formats."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
import torch
from PIL import Image

from mstar.errors import InvalidRequest, RequestFailed
from mstar.io.image import Picture, read_picture, transcode
from mstar.io.rgb import rgb_of
from mstar.io.video import open_video


def file(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def header_of(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and little more."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + check + b"\0\0\0\x0aIDATx\x9c"


NOISE = Image.effect_noise((40, 30), 50).convert("RGB")
WHOLE = file(NOISE)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_formats_are_told_by_their_content(format):
    assert read_picture("image", file(NOISE, format)) == Picture(format, 40, 30, False)


def test_transparency_is_seen():
    assert read_picture("mask", file(NOISE.convert("RGBA"))).transparent
    palette = file(NOISE.convert("P"), transparency=3)
    assert read_picture("mask", palette).transparent


def test_a_picture_on_its_side_has_the_size_that_one_sees():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = read_picture("image", file(NOISE, "JPEG", exif=exif))
    assert (picture.width, picture.height) == (30, 40)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not an image"),
        (b"hello", "is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
        (WHOLE[:8], "is broken"),
        (WHOLE[:30], "is broken"),
        (WHOLE[:60], "is broken"),
        (WHOLE[: len(WHOLE) // 2], "is broken"),
        (file(NOISE, "JPEG")[:500], "image"),
        (file(NOISE, "WEBP")[:100], "image"),
        (header_of(40, 30), "is broken"),
        (header_of(0, 0), "image"),
        (header_of(50_000, 50_000), "more than 1000 pixels"),
        (header_of(2**31 - 1, 2**31 - 1), "more than 1000 pixels"),
        (header_of(40, 26), "more than 1000 pixels"),
    ],
)
def test_what_cannot_be_read_is_refused(data, message):
    with pytest.raises(InvalidRequest, match=message) as error:
        read_picture("image", data, max_pixels=1000 if "pixels" in message else 10**6)
    assert error.value.field == "image"


def test_png_stays_as_it_is():
    assert transcode(WHOLE, "png") == (WHOLE, 40, 30)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_quality_costs_bytes(format):
    sizes = []
    for quality in (0, 50, 100):
        data, width, height = transcode(WHOLE, format, quality)
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == format.upper()
            assert image.size == (width, height) == (40, 30)
        sizes.append(len(data))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


def test_what_is_transparent_becomes_white_in_jpeg_and_stays_in_webp():
    clear = file(Image.new("RGBA", (16, 16), (255, 0, 0, 0)))
    with Image.open(io.BytesIO(transcode(clear, "jpeg")[0])) as image:
        assert image.getpixel((8, 8)) == (255, 255, 255)
    with Image.open(io.BytesIO(transcode(clear, "webp")[0])) as image:
        assert image.getpixel((8, 8))[3] == 0


@pytest.mark.parametrize("format", ["png", "jpeg"])
@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n\0", header_of(40, 30)[:20]])
def test_a_broken_png_of_a_model_is_its_failure(data, format):
    with pytest.raises(RequestFailed, match="no readable image"):
        transcode(data, format)


@pytest.mark.parametrize("read", [rgb_of, open_video])
@pytest.mark.parametrize("make", [torch.Tensor.bfloat16, torch.Tensor.to_sparse])
def test_tensors_that_numpy_does_not_know_are_refused(read, make):
    with pytest.raises(ValueError, match="must be dense and uint8, not "):
        read(make(torch.ones(1, 8, 8, 3)))
