"""Files that are broken, lie or are too large are refused by their headers, over the network."""

from __future__ import annotations

import base64
import io
import json
import os
import resource
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from mstar.http.encoders import open_encoder
from mstar.types import AudioBuffer
from tests.broken_media import bmp, gif, mp4, png, tiff, wav, webp
from tests.every_modality import picture
from tests.http.conftest import every_site


def image(format: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 8, 7)).save(out, format)
    return out.getvalue()


def sound(format: str) -> bytes:
    encoder = open_encoder(format, 24000)
    return encoder.push(np.zeros(24000, np.int16)) + encoder.finish()


def video(frames: int = 20, size: int = 64) -> bytes:
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(np.zeros((size, size, 3), np.uint8))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


def zip_bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", bytes(50 * 2**20))
    return out.getvalue()


WAV = AudioBuffer(np.zeros(24000, np.int16), 24000).to_wav()
# File name, content, part of the message.
REFUSED = [
    ("a.png", png(50_000, 50_000), "more than 67108864 pixels"),
    ("a.png", png(2**31 - 1, 2**31 - 1), "more than 67108864 pixels"),
    ("a.png", png(8193, 8192), "more than 67108864 pixels"),
    ("a.png", png(0, 10), "header"),
    ("a.gif", gif(40_000, 40_000), "more than 67108864 pixels"),
    ("a.gif", gif(1, 1, picture=(60_000, 60_000)), "more than 67108864 pixels"),
    ("a.gif", gif(2, 2, frames=2000), "more than 1024 frames"),
    ("a.bmp", bmp(40_000, 40_000), "more than 67108864 pixels"),
    ("a.tif", tiff(60_000, 60_000), "more than 67108864 pixels"),
    ("a.tif", tiff(10, 10, then=(60_000, 60_000)), "more than 67108864 pixels"),
    ("a.webp", webp(2**24, 255), "more than 67108864 pixels"),
    ("a.png", image("PNG")[:20], "header"),
    ("a.jpg", image("JPEG")[:20], "header"),
    ("a.jpg", b"\xff\xd8\xff" + bytes(100), "header"),
    ("a.webp", image("WEBP")[:20], "header"),
    ("a.gif", image("GIF")[:11], "cut off"),
    ("a.wav", wav(10**9), "cut off: it states 2000000000 bytes"),
    ("a.wav", WAV[:-1000], "cut off"),
    ("a.wav", WAV[:30], "cut off"),
    ("a.flac", sound("flac")[:20], "header"),
    ("a.mp3", sound("mp3")[:10], "header"),
    ("a.ogg", sound("opus")[:20], "header"),
    ("a.wav", AudioBuffer(np.zeros(11 * 8000, np.int16), 8000).to_wav(), "longer than 10 seconds"),
    ("a.wav", AudioBuffer(np.zeros(400, np.int16), 1).to_wav(), "longer than 10 seconds"),
    ("a.mp4", video()[:400], "cut off"),
    ("a.mp4", video()[:-100], "cut off"),
    ("a.mp4", mp4(seconds=10**8), "longer than 10 seconds"),
    ("a.mp4", mp4(samples=2**32 - 1), "more samples than it has"),
    ("a.mp4", mp4(fragment=2**32 - 1), "more than 4000000 samples"),
    ("a.mp4", video(60), "frames; at most 50"),
    ("a.webm", b"\x1aE\xdf\xa3" + bytes(100), "header"),
    ("a.zip", zip_bomb(), "its kind cannot be told"),
    ("a.png", zip_bomb(), "is no image"),
    ("a.wav", zip_bomb(), "header"),
    ("a.mp4", zip_bomb(), "header"),
    ("a.mp4", b"#EXTM3U\n\0\nfile:///etc/passwd\n", "header"),
    ("a.png", b"\0" * 10_000, "is no image"),
    ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "text goes into the field text"),
    ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n\xff\xfe", "its kind cannot be told"),
]
TAKEN = [
    ("a.png", image("PNG")),
    ("a.jpg", image("JPEG")),
    ("a.webp", image("WEBP")),
    ("a.gif", image("GIF")),
    ("a.wav", WAV),
    ("a.wav", sound("wav")),  # whose length is not stated
    ("a.flac", sound("flac")),
    ("a.mp3", sound("mp3")),
    ("a.opus", sound("opus")),
    ("a.aac", sound("aac")),
    ("a.mp4", video()),
]


@pytest.fixture(scope="module")
def narrow():
    """Ten seconds of sound or video, fifty frames."""
    limits = {"max_audio_seconds": 10, "max_video_seconds": 10, "max_video_frames": 50}
    with every_site(max_body_mb=4, **limits) as site:
        site.post(files={"files": ("a.png", picture(1, 1, 1))})  # imports are done
        yield site


def kind(case: object) -> str:
    return case if isinstance(case, str) else ""


@pytest.mark.parametrize(("name", "data", "message"), REFUSED, ids=kind)
def test_files_that_are_refused(narrow, name, data, message):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    reply = narrow.post(files={"files": (name, data)})
    assert time.perf_counter() - began < 1
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["detail"], reply.text
    assert reply.json()["detail"].startswith("files=")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024


def test_images_that_are_sent_as_videos_have_their_limits(narrow):
    file, said = ("a.gif", gif(2, 2, frames=60)), {"input_modalities": "video"}
    reply = narrow.post(files={"files": file}, data=said)
    assert (reply.status_code, "video has 51 frames; at most 50" in reply.text) == (400, True)
    assert narrow.post(files={"files": file}).status_code == 200


@pytest.mark.parametrize(("name", "data"), TAKEN, ids=kind)
def test_files_that_are_taken(narrow, name, data):
    data_form = {"model_kwargs": json.dumps({"tell": True}), "streaming": "false"}
    reply = narrow.post(files={"files": (name, data)}, data=data_form)
    assert reply.status_code == 200, reply.text


def test_media_in_messages_are_limited_too(narrow):
    def post(kind: str, data: bytes):
        url = f"data:;base64,{base64.b64encode(data).decode()}"
        part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
        messages = [{"role": "user", "content": [part]}]
        return narrow.post(data={"model_kwargs": json.dumps({"messages": messages})})

    for kind, data, message in [
        ("image", png(50_000, 50_000), "more than 67108864 pixels"),
        ("audio", wav(10**9), "cut off"),
        ("video", mp4(seconds=10**8), "longer than"),
    ]:
        reply = post(kind, data)
        assert reply.status_code == 400
        assert message in reply.json()["detail"]
        assert "messages" in reply.json()["detail"]
    assert post("image", image("PNG")).status_code == 200
    assert post("audio", WAV).status_code == 200
    assert post("video", video()).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "../../../../etc/passwd.png",
        "/etc/cron.d/evil.png",
        "..\\..\\windows\\evil.png",
        "a\0b.png",
        "x" * 3000 + ".png",
        ".",
        "..",
        "~/.ssh/authorized_keys.png",
        "a.png; rm -rf /",
        "$(touch evil).png",
        "\u202egnp.exe.png",
        "CON.png",
    ],
    ids=range(12),
)
def test_file_names_are_never_paths(narrow, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    opened = []
    real = os.open

    def noted(path, *args, **kwargs):
        opened.append(path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", noted)
    boundary, head = "b", f'name="files"; filename="{name}"'.encode()
    body = b"--b\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n"
    body += picture(2, 2, 9) + b"\r\n--b--\r\n"
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    reply = narrow.post(data=body, headers=headers)
    assert reply.status_code in (200, 400), reply.text
    assert list(tmp_path.iterdir()) == []
    assert opened == []


def test_the_operator_sets_the_limits():
    with every_site(max_pixels=100) as site:
        reply = site.post(files={"files": ("a.png", picture(16, 16, 1))})
        assert "more than 100 pixels" in reply.json()["detail"]
        url = f"data:image/png;base64,{base64.b64encode(picture(16, 16, 1)).decode()}"
        reply = site.post(data={"text": "x", "model_kwargs": json.dumps({"mask": url})})
        assert reply.json()["detail"] == "mask='image': the image has more than 100 pixels"


@pytest.mark.parametrize(
    "option",
    [
        {"max_pixels": 0},
        {"max_audio_seconds": -1},
        {"max_video_seconds": float("nan")},
        {"max_video_frames": 0},
        {"body_timeout": 0},
        {"media_dir": "/not/there"},
    ],
    ids=str,
)
def test_limits_that_nothing_can_keep_are_refused(option):
    from mstar.errors import InvalidRequest
    from mstar.http import create_app

    class Engine:
        pass

    (name,) = option
    with pytest.raises(InvalidRequest, match=name):
        create_app(Engine(), **option)
