"""The kind of a file: content first, name second, contradictions refused."""

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from mstar.errors import InvalidRequest
from mstar.io.sniff import kind_of


def image(form):
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, form)
    return out.getvalue()


def sound(form):
    out = io.BytesIO()
    soundfile.write(out, np.zeros(4800, np.float32), 24000, format=form)
    return out.getvalue()


def box(brand):
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0isommp42"


MKV = b"\x1aE\xdf\xa3\x93B\x82\x88matroska"
AVI = b"RIFF\x24\0\0\0AVI LIST"
AAC = bytes.fromhex("fff15080")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_images_by_content(form):
    assert kind_of(image(form), None) == "image"


@pytest.mark.parametrize("form", ["WAV", "RF64", "FLAC", "OGG", "MP3"])
def test_sound_by_content(form):
    assert kind_of(sound(form), "upload") == "audio"


@pytest.mark.parametrize("data", [AAC, b"ID3\4\0\0\0\0\0\0", box(b"M4A "), b"\xff\xfb\x90\x64"])
def test_more_sound_by_content(data):
    assert kind_of(data, None) == "audio"


@pytest.mark.parametrize("data", [box(b"isom"), box(b"qt  "), MKV, AVI, b"\0\0\0\x08wide\0\0"])
def test_video_by_content(data):
    assert kind_of(data, None) == "video"


@pytest.mark.parametrize(
    "text", ["hello", "grüße, 你好", "BMW and ID3 tags", "MM", '{"a": 1}', "\ufeffx", "OggX"]
)
def test_text_by_content(text):
    assert kind_of(text.encode(), None) == "text"


def test_text_that_is_cut_inside_a_character_is_text():
    assert kind_of(("x" + "é" * 4000).encode(), None) == "text"


def test_what_tells_nothing_falls_back_to_the_extension():
    noise = bytes([0x9C, 0, 1, 2]) * 8
    assert kind_of(noise, None) is None
    assert kind_of(noise, "a.bin") is None
    assert kind_of(noise, "a.MP3") == "audio"
    assert kind_of(b"", "a.png") == "image"
    assert kind_of(b"", None) is None


def test_utf_16_text_is_not_taken_for_sound():
    assert kind_of("Hello".encode("utf-16"), "notes.txt") == "text"


def test_a_wrong_extension_of_the_same_kind_or_of_none_is_accepted():
    assert kind_of(image("PNG"), "photo.jpg") == "image"
    assert kind_of(sound("WAV"), "sound.dat") == "audio"


def test_a_container_is_what_its_extension_says():
    assert kind_of(box(b"isom"), "a.m4a") == "audio"
    assert kind_of(box(b"isom"), "a.mp4") == "video"
    assert kind_of(MKV, "a.webm") == "video"
    assert kind_of(box(b"avif"), "a.avif") == "image"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (image("PNG"), "a.wav"),
        (sound("WAV"), "a.png"),
        (sound("FLAC"), "a.mp4"),
        (b"<html>404</html>", "photo.jpg"),
        (image("GIF"), "a.txt"),
    ],
)
def test_a_contradiction_is_refused(data, name):
    with pytest.raises(InvalidRequest, match="but holds") as info:
        kind_of(data, name)
    assert info.value.value == name
