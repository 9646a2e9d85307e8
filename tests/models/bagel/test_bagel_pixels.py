"""Images in and out: colours, sizes, patches, files that are odd or broken."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mstar.io.rgb import open_image, to_rgb
from mstar.models.bagel.config import BagelConfig
from mstar.models.bagel.pixels import (
    ResizeRule,
    new_size,
    patchify,
    resized,
    to_pixels,
    to_png,
    to_uint8,
    unpatchify,
)

DATA = Path(__file__).parents[2] / "data" / "bagel"
FACTS = json.loads((DATA / "goldens.json").read_text())
TINY = BagelConfig.from_folder(Path(__file__).parents[3] / "mstar/models/bagel/tiny/bagel")
RULES = {
    "vae_real(1024,512,16)": BagelConfig().vae_rule,
    "vit_real(980,224,14)": BagelConfig().vit_rule,
    "vae_here": TINY.vae_rule,
    "vit_here": TINY.vit_rule,
}


def file_of(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


# -- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "size", "expected"), FACTS["resize_rule"])
def test_sizes_are_those_of_the_reference(rule, size, expected):
    assert list(new_size(RULES[rule], *size)) == expected


@pytest.mark.parametrize("rule", [RULES["vae_real(1024,512,16)"], RULES["vit_real(980,224,14)"]])
def test_no_size_exceeds_the_rule(rule):
    sides = [1, 2, 7, 100, 223, 511, 513, 979, 1025, 1344, 3000, 60000]
    for width in sides:
        for height in sides:
            found = new_size(rule, width, height)
            assert max(found) <= rule.max_size
            assert min(found) >= rule.stride
            assert not any(side % rule.stride for side in found)


def test_many_pixels_shrink_an_image():
    rule = ResizeRule(max_size=1000, min_size=10, stride=10, max_pixels=500_000)
    assert new_size(rule, 1000, 1000) == (500, 500)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stride": 0}, "stride=0"),
        ({"max_size": 1000}, "max_size=1000: must be a multiple of 16"),
        ({"min_size": 2048}, "min_size=2048: must not exceed max_size=1024"),
        ({"max_pixels": 100}, "max_pixels=100"),
    ],
)
def test_rules_that_no_image_can_follow_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        ResizeRule(**{"max_size": 1024, "min_size": 512, "stride": 16, **change})


# -- the goldens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["image0", "image1"])
def test_pixels_are_those_of_the_reference(name):
    goldens = load_file(DATA / "goldens.safetensors")
    image = resized(open_image((DATA / f"{name}.png").read_bytes()), TINY.vae_rule)
    for found, kind in ((image, "vae"), (resized(image, TINY.vit_rule), "vit")):
        expected = goldens[f"preprocess.{name}.{kind}_resized"]
        assert torch.equal(torch.from_numpy(np.array(found)), expected)


# -- colours -------------------------------------------------------------------------------------


def spotted(mode):
    """White, black, and something else."""
    image = Image.new("RGB", (8, 4), (200, 100, 50))
    image.putpixel((0, 0), (255, 255, 255))
    image.putpixel((1, 0), (0, 0, 0))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "F"])
def test_opaque_images_of_any_mode_become_rgb(mode):
    found = to_rgb(spotted("L" if mode == "F" else "RGB").convert(mode))
    assert (found.mode, found.size) == ("RGB", (8, 4))
    white, black = np.array(found)[0, :2].astype(int)
    assert white.min() >= 250
    assert black.max() <= 5


def test_transparent_pixels_are_white_and_half_transparent_ones_pale():
    image = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    image.putpixel((2, 0), (200, 0, 0, 128))
    found = np.array(open_image(file_of(image)))[0]
    assert found[:2].tolist() == [[200, 0, 0], [255, 255, 255]]
    assert found[2].tolist() == [227, 127, 127]


def test_grey_with_alpha_and_palettes_with_transparency_are_put_on_white():
    grey = Image.new("LA", (2, 1), (60, 255))
    grey.putpixel((1, 0), (60, 0))
    assert np.array(open_image(file_of(grey)))[0, :, 0].tolist() == [60, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    found = np.array(open_image(file_of(palette, transparency=1)))[0]
    assert found.tolist() == [[10, 20, 30], [255, 255, 255]]
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (9, 9, 9))
    found = np.array(open_image(file_of(keyed, transparency=(1, 2, 3))))[0]
    assert found.tolist() == [[255, 255, 255], [9, 9, 9]]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_brightness(format):
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    found = np.array(open_image(file_of(deep, format)))
    assert found[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]
    assert np.array(to_rgb(Image.fromarray(np.array([[7]], dtype=np.int32))))[0, 0, 0] == 7


def test_images_are_turned_as_their_exif_data_say():
    image = Image.new("RGB", (16, 8))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    found = open_image(file_of(image, "JPEG", exif=exif, quality=95))
    assert found.size == (8, 16)
    assert found.getpixel((4, 2))[0] > 240
    assert found.getpixel((4, 13))[0] < 15


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_picture_counts(format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = file_of(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_files_that_are_no_whole_image_are_refused():
    whole = file_of(Image.effect_noise((64, 64), 50))
    for data, says in (
        (b"", "0 bytes that are no image"),
        (b"hello", "5 bytes that are no image"),
        (file_of(Image.new("RGB", (8, 8)), "EPS"), "bytes that are no image"),
        (whole[: len(whole) // 2], "the image is broken"),
        (file_of(Image.new("RGB", (64, 64)), "JPEG")[:300], "the image is broken|no image"),
        (file_of(Image.new("1", (8193, 8193))), "more than 67108864 pixels"),
    ):
        with pytest.raises(ValueError, match=says):
            open_image(data)


def test_images_without_pixels_are_refused():
    with pytest.raises(ValueError, match="the image has no pixels: 0 x 4"):
        to_rgb(Image.new("RGB", (0, 4)))


# -- patches -------------------------------------------------------------------------------------


def test_in_a_patch_the_channel_runs_fastest():
    x = torch.randn(2, 5, 6, 9)
    patches = patchify(x, 3)
    assert patches.shape == (2, 2 * 3, 3 * 3 * 5)
    for row, column, a, b, channel in [(0, 0, 0, 0, 0), (1, 2, 2, 1, 4), (0, 1, 1, 2, 3)]:
        found = patches[1, row * 3 + column, (a * 3 + b) * 5 + channel]
        assert found == x[1, channel, row * 3 + a, column * 3 + b]
    assert torch.equal(unpatchify(patches, 2, 3, 3), x)
    assert torch.equal(unpatchify(patchify(x[0], 3), 2, 3, 3), x[0])


def test_pixels_run_from_minus_one_to_one_and_back_to_bytes_that_are_cut():
    image = Image.new("RGB", (2, 1), (0, 255, 128))
    assert to_pixels(image)[:, 0, 0].tolist() == pytest.approx([-1, 1, 1 / 255], abs=1e-6)
    levels = to_uint8(torch.tensor([-7.0, -1.0, 0.0, 0.999, 1.0, 7.0]).expand(3, 1, 6))
    assert levels[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    found = np.array(Image.open(io.BytesIO(to_png(levels))))
    assert found.tolist() == levels.tolist()
