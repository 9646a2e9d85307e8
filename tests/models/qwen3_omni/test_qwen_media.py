"""Sounds, images and videos of all kinds, whole and broken, up to what the encoders take."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from qwen_loop import FULL

from mstar.errors import InvalidRequest
from mstar.models.qwen3_omni.card import PARAMETERS
from mstar.models.qwen3_omni.material import Reader
from mstar.models.qwen3_omni.mel import log_mel
from mstar.models.qwen3_omni.networks import networks
from mstar.models.qwen3_omni.pixels import IMAGES, VIDEOS, PixelRule, normalised, to_patches
from mstar.models.qwen3_omni.resample import resampled
from mstar.models.qwen3_omni.sounds import read_sound, sound_of_video
from mstar.models.qwen3_omni.visuals import Sampling, read_picture, read_video, sampled
from mstar.types import AudioBuffer

CONFIG = networks(FULL, speech=False).omni.config.thinker


def tone(hertz, rate, seconds=1.0):
    return np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate).astype(np.float32)


def file_of(samples, rate, format="WAV", subtype=None):
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=format, subtype=subtype)
    return out.getvalue()


def film(count=37, fps=10, size=(64, 48), sound=0, codec="mpeg4"):
    """A video that gets brighter by 6 with every frame."""
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        seen = file.add_stream(codec, rate=fps)
        seen.width, seen.height = size
        seen.pix_fmt = "yuv420p"
        heard = file.add_stream("aac", rate=32000, layout="mono") if sound else None
        for index in range(count):
            pixels = np.full((size[1], size[0], 3), 6 * index % 256, np.uint8)
            file.mux(seen.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(seen.encode())
        if sound:
            frame = av.AudioFrame.from_ndarray(
                tone(440, 32000, sound)[None], format="fltp", layout="mono"
            )
            frame.sample_rate = 32000
            file.mux(heard.encode(frame))
            file.mux(heard.encode())
    return out.getvalue()


# -- sounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100, 48000, 96000])
def test_tones_keep_their_pitch_and_level(rate):
    found = resampled(tone(440, rate), rate, 16000)
    assert found.shape == (16000,)
    assert abs(found - tone(440, 16000))[200:-200].max() < 1e-5


def test_what_cannot_be_heard_at_16_khz_is_filtered_out():
    assert abs(resampled(tone(9500, 48000), 48000, 16000)[200:-200]).max() < 1e-5


def test_odd_rates_are_taken_for_near_ones():
    found = resampled(tone(440, 44101), 44101, 16000)
    assert len(found) == 16000
    assert abs(found - tone(440, 16000))[200:-200].max() < 0.05


@pytest.mark.parametrize(
    ("format", "subtype", "rate"),
    [
        ("WAV", "PCM_U8", 96000),
        ("WAV", "PCM_16", 44100),
        ("FLAC", "PCM_24", 48000),
        ("OGG", "VORBIS", 32000),
        ("MP3", None, 24000),
    ],
)
def test_files_in_stereo(format, subtype, rate):
    both = np.stack([tone(440, rate), tone(440, rate) * 0.5], 1)
    found = read_sound(("sound", file_of(both, rate, format, subtype)))
    assert abs(len(found.samples) - 16000) < 50
    assert abs(abs(found.samples[1000:-1000]).max() - 0.75) < 0.05


def test_arrays(tmp_path):
    wave = tone(440, 16000)
    same = [
        (wave, 16000),
        (np.stack([wave, wave], 1), 16000),
        (torch.from_numpy(np.stack([wave, wave])), 16000.0),
    ]
    for given in same:
        found = read_sound(given)
        assert np.array_equal(found.samples, wave)
        assert found.key == read_sound(same[0]).key
        assert found.frames == 100
    pcm = (wave * 32767).astype(np.int16)
    for given in (AudioBuffer(pcm, 16000), (pcm, 16000)):
        assert abs(read_sound(given).samples - wave).max() < 1e-4
    assert not read_sound((np.full(400, 128, np.uint8), 16000)).samples.any()
    (tmp_path / "tone.wav").write_bytes(file_of(wave, 16000))
    assert len(read_sound(tmp_path / "tone.wav").samples) == 16000


def test_silence_has_features():
    features = log_mel(np.zeros(16000, np.float32))
    assert features.shape == (128, 100)
    assert (features == -1.5).all()


def test_the_shortest_sound_has_a_frame():
    assert log_mel(tone(440, 16000)[:160]).shape == (128, 1)
    with pytest.raises(ValueError, match="less than a frame"):
        log_mel(np.zeros(159, np.float32))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"", "is no audio"),
        (b"not a sound", "is no audio"),
        (file_of(tone(440, 16000), 16000)[:9000], "is cut off"),
        ((np.zeros(100), 16000), "it has 6.25 ms"),
        ((np.zeros(0), 16000), "it has 0 ms"),
        ((np.full(999, np.nan), 16000), "samples that are no numbers"),
        ((np.zeros(999), 0), "sample_rate=0"),
        ((np.zeros((9, 9, 9)), 16000), "must be an array of numbers"),
        ((np.zeros(70_000), 16000), "longer than 4 seconds"),
        (file_of(tone(440, 8000, 5), 8000), "longer than 4 seconds"),
        ("/no/such/file.wav", "No such file"),
        (None, "must be a path"),
    ],
)
def test_sounds_that_cannot_be_heard(given, said):
    with pytest.raises(InvalidRequest, match=said):
        read_sound(given, longest=4.0)


# -- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ((70, 45), (64, 32)),
        ((80, 48), (64, 64)),  # halves go to the even number
        ((1080, 1920), (1088, 1920)),
        ((1, 1), (64, 64)),
        ((10_000, 5_000), (5_056, 2_528)),
    ],
)
def test_sizes_of_images(size, found):
    height, width = IMAGES.size(*size, 32)
    assert height % 32 == width % 32 == 0
    assert IMAGES.min_pixels <= height * width <= IMAGES.max_pixels
    if size not in ((70, 45),):
        assert (height, width) == found


def test_long_and_thin_images_are_refused():
    assert PixelRule(1, 10**9).size(6400, 32, 32) == (6400, 32)
    with pytest.raises(InvalidRequest, match="at most 200 times"):
        read_picture(Image.new("RGB", (201 * 8, 8)), CONFIG.vision)


def test_pictures_of_one_content_have_one_key(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
    image.save(tmp_path / "image.png")
    first = read_picture(image, CONFIG.vision)
    assert (first.grid, first.seconds) == ((1, 4, 6), None)
    for given in (tmp_path / "image.png", ("a.png", (tmp_path / "image.png").read_bytes())):
        again = read_picture(given, CONFIG.vision)
        assert again.key == first.key
        assert torch.equal(again.patches, first.patches)
    assert read_picture(image.rotate(180), CONFIG.vision).key != first.key
    with pytest.raises(InvalidRequest, match="no image"):
        read_picture(b"...", CONFIG.vision)


def test_patches_hold_every_pixel_once():
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), np.uint8)
    patches, grid = to_patches(frames, CONFIG.vision)
    assert grid == (2, 4, 6)
    # block (1, 2) of the second time, its lower left patch; row 5, column 7 of it, green
    patch = patches.view(2, 2, 3, 2, 2, 3, 2, 16, 16)[1, 1, 2, 1, 0]
    y, x = 1 * 32 + 16 + 5, 2 * 32 + 7
    assert patch[1, 0, 5, 7] == frames[2, y, x, 1]
    assert torch.equal(patch[:, 0], patch[:, 1])  # the last frame is repeated
    ends = normalised(torch.tensor([0, 255], dtype=torch.uint8))
    assert ends.tolist() == [-1.0, 1.0]


# -- videos --------------------------------------------------------------------------------------


def test_which_frames_are_seen():
    places, fps = sampled(300, 30.0, Sampling())
    assert (len(places), places[0], places[-1], fps) == (20, 0, 299, 2.0)
    assert sampled(20, 30.0, Sampling()) == ([0, 6, 13, 19], 6.0)  # as many as must be
    assert sampled(3, 30.0, Sampling()) == ([0, 2], 20.0)
    assert sampled(1, 30.0, Sampling()) == ([0], 2.0)
    assert sampled(0, 30.0, Sampling()) == ([], 2.0)
    places, fps = sampled(100_000, 25.0, Sampling(max_frames=101))
    assert (len(places), fps) == (100, pytest.approx(0.025))


def test_frames_of_a_file_are_those_that_were_chosen():
    found = read_video(film(), CONFIG.vision, rule=PixelRule(1024, VIDEOS.max_pixels))
    assert (found.grid, found.seconds) == ((3, 4, 4), 1.0)
    means = found.patches.view(3, -1, 3, 2, 256).float().mean((1, 2, 4)).flatten()
    wanted = torch.tensor([0, 7, 14, 22, 29, 36]) * 6.0
    assert (means - wanted).abs().max() < 4


def test_the_sound_of_a_video():
    found = sound_of_video(film(sound=1))
    assert abs(len(found.samples) - 16000) < 1500  # in whole blocks of the codec
    assert abs(abs(found.samples[3000:12000]).max() - 1) < 0.1
    assert sound_of_video(film()) is None


def test_arrays_of_frames_are_taken_as_they_are():
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    found = read_video(frames, CONFIG.vision, Sampling(fps=4.0), PixelRule(1024, 10**6))
    assert (found.grid, found.seconds) == ((3, 4, 4), 0.5)
    with pytest.raises(InvalidRequest, match="at most 4 are seen"):
        read_video(frames, CONFIG.vision, Sampling(max_frames=4))


def test_animations_and_lists_of_images_are_videos():
    reader = Reader(
        CONFIG, PARAMETERS.validate({"video_min_pixels": 1024, "use_audio_in_video": True})
    )
    frames = np.stack([np.full((64, 64, 3), 40 * k, np.uint8) for k in range(5)])
    images = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    images[0].save(file, "PNG", save_all=True, append_images=images[1:])
    expected = reader.read("video", frames)
    for given in (images, list(frames), file.getvalue()):
        found = reader.read("video", given)
        assert (found.key, found.size) == (expected.key, expected.size)
    sound = np.zeros(1600, np.float32), 16000
    assert reader.read("video", (images, sound)).size.sounds == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"", "is no video"),
        (film(1)[:200], "cut off, or broken"),
        (file_of(tone(440, 16000), 16000), "holds no video"),
        (np.zeros((2, 8, 8), np.uint8), "must be uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no frames"),
        (film(40, 1, (16, 16)), "longer than 20 seconds"),
        (5, "must be a path"),
        ([np.zeros((64, side, 3), np.uint8) for side in (64, 640)], "several sizes"),
    ],
)
def test_videos_that_cannot_be_seen(given, said):
    with pytest.raises(InvalidRequest, match=said):
        read_video(given, CONFIG.vision, longest=20.0)
