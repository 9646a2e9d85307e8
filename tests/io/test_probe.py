"""What headers state, true or not, is read within milliseconds and without memory."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from mstar.io.isobmff import walk_isobmff
from mstar.io.probe import Unreadable, open_container, probe_audio, probe_image, probe_video
from mstar.types import AudioBuffer
from tests.broken_media import bmp, box, gif, mp4, png, tiff, wav, webp


def image(format: str, size=(20, 10), frames: int = 1) -> bytes:
    out = io.BytesIO()
    pictures = [Image.new("RGB", size, (40 * i, 0, 255 - 40 * i)) for i in range(frames)]
    several = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    pictures[0].save(out, format, **several)
    return out.getvalue()


def sound(format: str, seconds: float = 1.0) -> bytes:
    import soundfile

    out = io.BytesIO()
    samples = np.sin(np.arange(int(24000 * seconds)) * 0.05)
    soundfile.write(out, samples, 24000, format=format)
    return out.getvalue()


def video(seconds: int = 2, size=(64, 48), container: str = "mp4", **options: str) -> bytes:
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format=container, options=options) as file:
        stream = file.add_stream("mpeg4" if container != "webm" else "vp8", rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for _ in range(10 * seconds):
            frame = av.VideoFrame.from_ndarray(np.zeros((size[1], size[0], 3), np.uint8))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


@pytest.fixture(autouse=True)
def cheap():
    """Every test of this file ends soon and without memory."""
    tracemalloc.start()
    began = time.perf_counter()
    yield
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 5
    assert peak < 100 * 2**20


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_state_their_size(format):
    found = probe_image(image(format))
    assert (found.width, found.height, found.frames) == (20, 10, 1)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "TIFF"])
def test_animated_images_state_their_frames(format):
    data = image(format, frames=5)
    assert probe_image(data).frames == 5
    assert probe_image(data, most_frames=3).frames == 4


@pytest.mark.parametrize("make", [png, gif, bmp, tiff, webp])
def test_enormous_images_are_only_looked_at(make):
    found = probe_image(make(50_000, 50_000))
    assert found.width * found.height > 10**8


def test_pictures_larger_than_their_gif_count():
    found = probe_image(gif(1, 1, picture=(60_000, 60_000)))
    assert (found.width, found.height) == (60_000, 60_000)


def test_a_later_page_of_a_tiff_counts():
    found = probe_image(tiff(10, 10, then=(9_000, 9_000)))
    assert (found.width, found.height, found.frames) == (9_000, 9_000, 2)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("length", [0, 1, 4, 12, 20])
def test_images_without_their_header_are_unreadable(format, length):
    with pytest.raises(Unreadable, match=r"header|image|picture"):
        probe_image(image(format)[:length])


def test_many_frames_are_not_all_counted():
    data = gif(8, 8, frames=300_000)
    began = time.perf_counter()
    assert probe_image(data, 1024).frames == 1025
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_sound_states_its_length(format):
    found = probe_audio(sound(format))
    assert found.seconds == pytest.approx(1, abs=0.06)
    assert found.channels == 1


def test_sound_in_other_containers_has_a_length():
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=24000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 24000), np.float32), "fltp", "mono")
        frame.sample_rate = 24000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert probe_audio(out.getvalue()).seconds == pytest.approx(1, abs=0.1)


def test_plain_sound_in_quicktime_may_be_long():
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format="mov") as file:
        stream = file.add_stream("pcm_s16le", rate=48000, layout="mono")
        for _ in range(100):  # more samples than other tracks may have
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.int16), "s16", "mono")
            frame.sample_rate = 48000
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert probe_audio(out.getvalue()).seconds == pytest.approx(100, abs=0.1)


def test_a_streamed_wav_has_the_length_of_its_samples():
    data = bytearray(AudioBuffer(np.zeros(24000, np.int16), 24000).to_wav())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert probe_audio(bytes(data)).seconds == 1


def test_a_streamed_flac_is_counted_up_to_the_limit():
    pytest.importorskip("av")
    from mstar.http.encoders import open_encoder

    encoder = open_encoder("flac", 24000)
    data = encoder.push(np.zeros(240_000, np.int16)) + encoder.finish()
    assert probe_audio(data).seconds == pytest.approx(10, abs=0.2)
    assert 2 < probe_audio(data, most_seconds=2).seconds < 3


def test_a_wav_that_states_more_than_it_has_is_cut_off():
    with pytest.raises(Unreadable, match="cut off: it states 2000000000 bytes"):
        probe_audio(wav(10**9))
    with pytest.raises(Unreadable, match="cut off"):
        probe_audio(sound("WAV")[:-100])
    with pytest.raises(Unreadable, match="cut off"):
        probe_audio(sound("WAV")[:20])


def test_a_flac_may_state_what_it_likes():
    data = bytearray(sound("FLAC"))
    data[21:26] = b"\xff\xff\xff\xff\xff"  # 2**36 - 1 samples
    assert probe_audio(bytes(data)).seconds > 10**6


@pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3"])
def test_sound_without_its_header_is_unreadable(format):
    with pytest.raises(Unreadable):
        probe_audio(sound(format)[:16])


@pytest.mark.parametrize("container", ["mp4", "webm", "matroska", "avi"])
def test_videos_state_size_and_length(container):
    found = probe_video(video(container=container))
    assert (found.width, found.height) == (64, 48)
    assert found.seconds == pytest.approx(2, abs=0.2)
    assert found.frames == pytest.approx(20, abs=2)


def test_a_video_in_fragments_is_counted():
    data = video(movflags="frag_keyframe+empty_moov")
    assert probe_video(data).seconds == pytest.approx(2, abs=0.2)


def test_a_video_may_state_a_huge_length():
    assert probe_video(mp4(seconds=10**8)).seconds == 10**8


@pytest.mark.parametrize("length", [0, 8, 40, 400, -100])
def test_cut_off_videos_are_unreadable(length):
    with pytest.raises(Unreadable):
        probe_video(video()[:length])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (mp4(samples=2**32 - 1), "more samples than it has"),
        (mp4(samples=2**32 - 1, size=0), "more samples than it has"),
        (mp4(samples=300, size=1, per_chunk=2**32 - 1), "states more than 4000000 samples"),
        (mp4(fragment=2**32 - 1), "states more than 4000000 samples"),
        (mp4(entries=2**32 - 1), "its table stts ends behind its box"),
        (box(b"ftyp", b"isom") + b"\0\0\0\4moov", "shorter than its header"),
        (box(b"ftyp", b"isom") + b"\xff\0\0\0moov", "ends behind the file"),
        (box(b"ftyp", b"isom") + box(b"moov", box(b"trak", b"") * 50_001), "too many boxes"),
        (box(b"ftyp", b"isom"), "no index"),
    ],
)
def test_tables_that_state_what_is_not_there(data, message):
    assert message in walk_isobmff(data).broken
    with pytest.raises(Unreadable, match=message):
        probe_video(data)


def test_deep_boxes_end():
    data = b""
    for _ in range(1000):
        data = box(b"moov", data)
    assert "too many boxes" in walk_isobmff(box(b"ftyp", b"isom") + data).broken


def test_a_playlist_opens_nothing(tmp_path):
    av = pytest.importorskip("av")
    part = tmp_path / "secret.mp4"
    part.write_bytes(video())
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{part}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {part}\n",
    ):
        with pytest.raises(av.FFmpegError):
            open_container(text.encode())
        with pytest.raises(Unreadable):
            probe_video(text.encode() + b"\0\1")


@pytest.mark.parametrize("probe", [probe_image, probe_audio, probe_video])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"PK\3\4" + b"\0" * 100,
        bytes(1000),
        zlib.compress(bytes(10**6)),
        struct.pack("<4sI4s", b"RIFF", 4, b"WAVE"),
        bytes(range(256)) * 400,
    ],
    ids=["nothing", "text", "zip", "zeros", "deflated", "riff", "bytes"],
)
def test_what_is_no_media_is_unreadable(probe, data):
    with pytest.raises(Unreadable):
        probe(data)
