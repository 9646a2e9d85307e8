"""Videos of every kind become images; broken ones say so."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mstar.io.video import open_video
from tests import broken_media

FRAMES = np.stack([np.full((24, 32, 3), 20 * i, np.uint8) for i in range(9)])


def film(frames=FRAMES, codec="mpeg4", format="mp4"):
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format=format) as file:
        stream = file.add_stream(codec, rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


def animation(format):
    out = io.BytesIO()
    first, *rest = map(Image.fromarray, FRAMES)
    first.save(out, format, save_all=True, append_images=rest, lossless=True)
    return out.getvalue()


def shades(video, places=None):
    return [np.asarray(image).mean() for image in video.images(places)]


def test_files_are_decoded(tmp_path):
    data = film()
    (tmp_path / "clip.mp4").write_bytes(data)
    for given in (data, ("clip.mp4", data), tmp_path / "clip.mp4", str(tmp_path / "clip.mp4")):
        video = open_video(given)
        assert (video.count, video.fps) == (9, 10)
        np.testing.assert_allclose(shades(video), 20 * np.arange(9), atol=3)
        np.testing.assert_allclose(shades(video, [2, 5]), [40, 100], atol=3)
    assert shades(video, []) == []


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_animations_need_no_pyav(format, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    video = open_video(animation(format))
    assert video.count == 9
    np.testing.assert_allclose(shades(video, [0, 3, 8]), [0, 60, 160], atol=1)


def test_sequences_and_arrays(tmp_path):
    (tmp_path / "0.png").write_bytes(animation("PNG"))  # of which the first is taken
    mixed = [tmp_path / "0.png", Image.fromarray(FRAMES[1]), FRAMES[2]]
    assert shades(open_video(mixed)) == [0, 20, 40]
    assert shades(open_video(FRAMES), [1, 4]) == [20, 80]
    assert shades(open_video(torch.from_numpy(FRAMES))) == shades(open_video(FRAMES))
    assert open_video(FRAMES[0]).count == open_video(Image.fromarray(FRAMES[0])).count == 1
    assert open_video(FRAMES[:0]).count == 0


def test_a_file_that_is_cut_off_ends_early():
    data = film(np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8), format="avi")
    try:
        video = open_video(data[: len(data) // 2])
    except ValueError:
        return
    assert len(list(video.images())) < 9


def test_without_pyav_the_extra_is_named(monkeypatch):
    data = film()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install mstar\[video\]"):
        open_video(data)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"", "no video"),
        (b"not a video", "no video"),
        ("/no/such/clip.mp4", "No such file"),
        (("clip.mp4", animation("GIF")), "is named .mp4"),
        (broken_media.gif(20_000, 20_000, 2), "pixels"),
        (np.zeros((2, 8, 8, 3)), "must be uint8"),
        (np.zeros((2, 8, 8, 4), np.uint8), "must be uint8"),
        (np.zeros((2, 0, 8, 3), np.uint8), "no pixels"),
        (7, "must be a path"),
    ],
)
def test_what_is_no_video(given, said):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match=said):
        open_video(given)


def test_films_that_are_cut_off_or_too_long():
    with pytest.raises(ValueError, match="is cut off, or broken"):
        open_video(film()[:300])
    with pytest.raises(ValueError, match=r"longer than 0\.5 seconds"):
        open_video(film(), longest=0.5)
