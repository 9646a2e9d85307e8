"""What BAGEL refuses, and what odd images become."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from asking import file_of, levels
from PIL import Image

from mstar import Engine, InvalidRequest

PICTURE = file_of("image0.png")


@pytest.fixture(scope="module")
def engine():
    with Engine("bagel-tiny", kv_tokens=2048) as engine:
        yield engine


def encoded(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# A PNG of 0 x 5 pixels.
NO_WIDTH = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0))
NO_WIDTH += chunk(b"IDAT", zlib.compress(bytes(5))) + chunk(b"IEND", b"")
IMAGE = {"output_modalities": ("image",)}
UNGUIDED = "negative_prompt", "guidance leads away from it, and there is none"
BAD = [
    ({"text": ""}, "text", "is empty"),
    ({"text": " \n "}, "text", "is empty"),
    ({}, "text", "nothing was given"),
    ({"text": "x", "audio": b"RIFF"}, "audio", "takes text, image only"),
    ({"text": "x", "output_modalities": ("audio",)}, "output_modalities", "has text, image only"),
    ({"text": "x", "output_modalities": ()}, "output_modalities", "at least one"),
    ({"text": "x", "output_modalities": [["text"]]}, "output_modalities", "list of modalities"),
    ({"text": "x", "output_modalities": ("text", "image"), "think": False}, "think", "leave it"),
    ({"text": "x", "width": 64}, "width", "is for images"),
    ({"text": "x", "latents": np.zeros((16, 64))}, "latents", "is for images"),
    ({"text": "x", "negative_prompt": "y"}, "negative_prompt", "is for images"),
    ({"text": "x", **IMAGE, "width": 60}, "width", "nearest: 48 and 64"),
    ({"text": "x", **IMAGE, "height": 2048}, "height", "at most 128; nearest: 128"),
    ({"text": "x", **IMAGE, "height": 3}, "height", "nearest: 16"),
    ({"text": "x", **IMAGE, "width": 0}, "width", "at least 1"),
    ({"text": "x", **IMAGE, "width": 64.5}, "width", "an integer"),
    ({"text": "x", **IMAGE, "num_timesteps": 1}, "num_timesteps", "from 2 to 1000"),
    ({"text": "x", **IMAGE, "timestep_shift": 0}, "timestep_shift", "above 0"),
    ({"text": "x", **IMAGE, "cfg_text_scale": float("nan")}, "cfg_text_scale", "a number"),
    ({"text": "x", **IMAGE, "cfg_interval": [0.5]}, "cfg_interval", "two numbers"),
    ({"text": "x", **IMAGE, "cfg_interval": [0.9, 0.1]}, "cfg_interval", "low <= high"),
    ({"text": "x", **IMAGE, "cfg_renorm_type": "local"}, "cfg_renorm_type", "one of global"),
    ({"text": "x", **IMAGE, "cfg_renorm_min": 2}, "cfg_renorm_min", "from 0 to 1"),
    ({"text": "x", **IMAGE, "num_images": 0}, "num_images", "from 1 to 16"),
    ({"text": "x", **IMAGE, "seed": -1}, "seed", "0"),
    ({"text": "x", **IMAGE, "latents": np.zeros((3, 64))}, "latents", "must be (64, 64)"),
    ({"text": "x", **IMAGE, "latents": "noise"}, "latents", "array of numbers"),
    ({"text": "x", **IMAGE, "latents": [[float("inf")]]}, "latents", "finite"),
    ({"text": "x", **IMAGE, "latents": np.full((64, 64), 1e300)}, "latents", "finite"),
    ({"text": "x", **IMAGE, "vae_noise": np.zeros((1, 2))}, "vae_noise", "0 input images"),
    (
        {"text": "x", **IMAGE, "num_images": 2, "latents": np.zeros((64, 64))},
        "latents",
        "num_images=1",
    ),
    (
        {"text": "x", "images": PICTURE, **IMAGE, "vae_noise": np.zeros((1, 2))},
        "vae_noise",
        "must be (16, 12, 16)",
    ),
    ({"text": "x", **IMAGE, "steps": 3}, "steps", "unknown parameter of bagel"),
    ({"text": "x", **IMAGE, "guidance_scale": 2, "cfg_text_scale": 2}, "cfg_text_scale", "same"),
    ({"text": "x", "images": b"no image"}, "images", "no image"),
    ({"text": "x", "images": PICTURE[:300]}, "images", "broken"),
    ({"text": "x", "images": "/no/such/file.png"}, "images", "No such file"),
    ({"text": "x", "images": 7}, "images", "must be a path"),
    ({"text": "x", "images": np.zeros((0, 4, 3), np.uint8)}, "images", "uint8"),
    ({"text": "x", "images": np.zeros((4, 4, 3), np.float32)}, "images", "uint8"),
    ({"text": "x", "images": Image.new("RGB", (0, 5))}, "images", "no pixels"),
    ({"text": "x" * 40000}, "text", "the model takes"),
    ({"text": "word " * 700, **IMAGE}, "text", "KV cache"),
    ({"text": "x", "max_output_tokens": 4000}, "max_output_tokens", "there is room for 2044"),
    ({"text": "x", "num_images": 2}, "num_images", "is for images"),
    ({"text": "x", "cfg_text_scale": 2.0}, "cfg_text_scale", "is for images"),
    ({"text": "x", "progress": True}, "progress", "is for images"),
    ({"text": "x", "max_think_tokens": 9}, "max_think_tokens", "text is asked for"),
    ({"text": "x", **IMAGE, "temperature": 1.0}, "temperature", "for a thought before it"),
    ({"text": "x", **IMAGE, "stop": "y"}, "stop", "for a thought before it"),
    ({"text": "x", **IMAGE, "max_think_tokens": 9}, "max_think_tokens", "a thought before it"),
    (
        {"text": "x", "output_modalities": ("text", "image"), "max_output_tokens": 9},
        "max_output_tokens",
        "use max_think_tokens",
    ),
    ({"text": "x", "input_modalities": ("image", "text")}, "input_modalities", "given 0 times"),
    ({"text": "x", "images": NO_WIDTH}, "images", "no image"),
    (
        {"text": "x", **IMAGE, "think": True, "max_think_tokens": 9000},
        "max_think_tokens",
        "there is room for",
    ),
    ({"text": "x", **IMAGE, "negative_prompt": "word " * 900}, "text", "KV cache"),
    ({"text": "x", **IMAGE, "negative_prompt": "y", "cfg_text_scale": 1}, *UNGUIDED),
    ({"text": "x", **IMAGE, "negative_prompt": "y", "cfg_interval": [0, 0]}, *UNGUIDED),
    ({"messages": [{"role": "user", "content": []}]}, "messages", "neither text nor an image"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages", "neither text nor an image"),
    ({"text": "x", "max_output_tokens": 4, "min_tokens": 5}, "min_tokens", "exceed"),
    ({"text": "x", "images": PICTURE, "input_modalities": ("text",)}, "input_modalities", "image"),
    (
        {"text": "x", "images": PICTURE, "input_modalities": ("image", "image", "text")},
        "input_modalities",
        "named 2 times",
    ),
    ({"messages": []}, "messages", "not empty"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "role must be one of"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages", "parts are"),
    ({"messages": [{"role": "user", "content": "x"}], "images": PICTURE}, "messages", "into"),
    ({"messages": [{"role": "user", "content": "x"}], "text": "x"}, "messages", "either"),
]


@pytest.mark.parametrize(("asked", "field", "says"), BAD, ids=lambda value: str(value)[:40])
def test_it_is_refused_by_name_before_anything_runs(engine, asked, field, says):
    before = engine.stats()["nodes"]["lm"]["calls"]
    with pytest.raises(InvalidRequest) as refused:
        engine.generate(**asked)
    assert refused.value.field == field
    assert says in str(refused.value)
    assert engine.stats()["nodes"]["lm"]["calls"] == before


ODD = {
    "palette": lambda image: encoded(image.convert("P"), "PNG"),
    "grey": lambda image: encoded(image.convert("L"), "PNG"),
    "one bit": lambda image: encoded(image.convert("1"), "PNG"),
    "cmyk": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "sixteen bits": lambda image: encoded(
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"
    ),
    "animated": lambda image: encoded(
        image, "GIF", save_all=True, append_images=[image.rotate(90)]
    ),
    "webp": lambda image: encoded(image, "WEBP"),
    "one pixel": lambda image: encoded(image.resize((1, 1)), "PNG"),
    "a line": lambda image: encoded(image.resize((900, 3)), "PNG"),
    "a thread": lambda image: encoded(image.resize((20_000, 1)), "PNG"),
    "a wall": lambda image: encoded(image.resize((2, 700)), "PNG"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_are_seen_and_edited(engine, kind):
    image = Image.open(io.BytesIO(PICTURE)).convert("RGB")
    data = ODD[kind](image)
    assert engine.chat("What is it?", images=data, max_output_tokens=3).text
    result = engine.generate(text="Bluer", images=data, num_timesteps=3, seed=0, **IMAGE)
    height, width, _ = levels(result.images[0]).shape
    assert max(height, width) <= 128
    assert not height % 16
    assert not width % 16


def test_an_image_is_turned_as_a_viewer_would(engine):
    image = Image.open(io.BytesIO(PICTURE)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(image, "JPEG", exif=exif, quality=95)
    result = engine.generate(text="Bluer", images=turned, num_timesteps=3, **IMAGE)
    assert levels(result.images[0]).shape == (128, 96, 3)


def test_the_same_picture_in_any_wrapping_gives_the_same_answer(engine, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(PICTURE)
    image = Image.open(path).convert("RGB")
    wrapped = [PICTURE, path, str(path), ("a.png", PICTURE), image, np.asarray(image)]
    answers = {
        engine.chat("What is it?", images=[value], max_output_tokens=8).text for value in wrapped
    }
    assert len(answers) == 1
