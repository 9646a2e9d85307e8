"""Sound that is encoded is the sound that comes out again."""

import io
import sys

import numpy as np
import pytest
import soundfile

from mstar.errors import InvalidRequest
from mstar.io.audio import FORMATS, check_format, encode_audio, open_wav_header
from mstar.types import AudioBuffer


def tone(samples, rate=24000):
    """A sine of 440 Hz."""
    wave = 12000 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate)
    return AudioBuffer(wave.astype(np.int16), rate)


@pytest.mark.parametrize("name", ["wav", "flac"])
def test_lossless_formats_keep_every_sample(name):
    audio = tone(24576)
    data, rate = soundfile.read(io.BytesIO(encode_audio(audio, name)), dtype="int16")
    assert rate == 24000
    assert np.array_equal(data, audio.pcm)


@pytest.mark.parametrize("name", ["ogg", "opus", "mp3"])
@pytest.mark.parametrize("samples", [1000, 24576, 24000 * 30])
def test_lossy_formats_keep_the_length_and_the_sound(name, samples):
    audio = tone(samples)
    data, rate = soundfile.read(io.BytesIO(encode_audio(audio, name)), dtype="int16")
    assert rate == 24000
    assert data.shape == (samples,)
    middle = slice(samples // 4, samples // 2)
    assert np.corrcoef(data[middle], audio.pcm[middle])[0, 1] > 0.95


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_says_what_it_is(name):
    info = soundfile.info(io.BytesIO(encode_audio(tone(4000), name)))
    assert (info.format, info.subtype, info.channels) == (*FORMATS[name], 1)


def test_no_sound_at_all_fits_into_wav_only():
    data, rate = soundfile.read(io.BytesIO(encode_audio(tone(0), "wav")))
    assert (len(data), rate) == (0, 24000)
    for name in ("flac", "ogg", "opus", "mp3"):
        with pytest.raises(InvalidRequest, match=f"0 samples.*{name}"):
            encode_audio(tone(0), name)


def test_a_format_that_is_not_known_is_refused():
    for check in (check_format, lambda name: encode_audio(tone(10), name)):
        with pytest.raises(InvalidRequest, match="format='aac': must be one of wav, flac"):
            check("aac")


@pytest.mark.parametrize(("name", "rate"), [("opus", 44100), ("mp3", 11000)])
def test_a_sample_rate_that_the_format_lacks_is_refused(name, rate):
    with pytest.raises(InvalidRequest, match=f"sample_rate={rate}: not for {name}.*only supports"):
        encode_audio(tone(100, rate), name)


def test_wav_needs_no_soundfile(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert len(encode_audio(tone(10), "wav")) == 44 + 20


def test_an_open_header_fits_before_samples_that_are_still_to_come():
    data = open_wav_header(24000) + tone(500).pcm.tobytes()
    assert data[4:8] == data[40:44] == b"\xff" * 4
    assert data[:4] + data[8:40] == (whole := tone(500).to_wav())[:4] + whole[8:40]
