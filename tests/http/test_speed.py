"""`speed` of `/v1/audio/speech`: the duration changes, the pitch does not."""

from __future__ import annotations

import base64
import io
import json
import sys

import numpy as np
import pytest

from mstar.errors import InvalidRequest
from mstar.http.encoders import FORMATS
from mstar.http.tempo import Tempo, check_speed

av = pytest.importorskip("av")
RATE = 24000
SHORT = {"max_tokens": 140, "ignore_eos": True, "seed": 3}
SPEECH = {"model": "orpheus-tiny", "input": "hello there", "voice": "tara", **SHORT}
SPEEDS = [0.25, 0.3, 0.5, 0.8, 1.1, 1.5, 2, 2.5, 4]


def tone(seconds: float = 3.0, hertz: float = 440) -> np.ndarray:
    turns = np.arange(int(RATE * seconds)) / RATE * hertz
    return (np.sin(2 * np.pi * turns) * 10000).astype(np.int16)


def paced(pcm: np.ndarray, speed: float, piece: int = 2048, rate: int = RATE) -> np.ndarray:
    tempo = Tempo(speed, rate)
    pieces = [tempo.push(pcm[at : at + piece]) for at in range(0, len(pcm), piece)]
    return np.concatenate([*pieces, tempo.finish()])


def pitch(pcm: np.ndarray, rate: int = RATE) -> float:
    """The loudest frequency, in Hz."""
    return np.argmax(np.abs(np.fft.rfft(pcm * np.hanning(len(pcm))))) * rate / len(pcm)


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_tone_takes_another_time_and_stays_the_tone(speed):
    pcm = tone()
    made = paced(pcm, speed)
    assert made.dtype == np.int16
    assert len(made) == pytest.approx(len(pcm) / speed, rel=0.02)
    assert pitch(made) == pytest.approx(440, rel=0.01)
    middle = made[len(made) // 4 : -len(made) // 4]
    assert np.sqrt(np.mean(middle.astype(float) ** 2)) == pytest.approx(7071, rel=0.1)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_other_sample_rates(rate):
    turns = np.arange(2 * rate) / rate * 440
    made = paced((np.sin(2 * np.pi * turns) * 10000).astype(np.int16), 1.6, rate=rate)
    assert len(made) / rate == pytest.approx(2 / 1.6, rel=0.02)
    assert pitch(made, rate) == pytest.approx(440, rel=0.01)


@pytest.mark.parametrize("piece", [1, 100, 4096, 10**6])
def test_pieces_make_no_difference(piece):
    pcm = tone(0.3)
    np.testing.assert_array_equal(paced(pcm, 1.5, piece), paced(pcm, 1.5))


def test_sound_comes_out_before_all_is_in():
    tempo = Tempo(1.5, RATE)
    early = sum(len(tempo.push(tone(0.1))) for _ in range(10))
    assert early > 0.8 * RATE / 1.5


@pytest.mark.parametrize("samples", [1, 10, 700, 2000])
@pytest.mark.parametrize("speed", [0.25, 2, 4])
def test_the_shortest_sounds_have_their_length(samples, speed):
    assert len(paced(tone()[:samples], speed)) == max(1, round(samples / speed))


@pytest.fixture(scope="module")
def plain(speaker) -> np.ndarray:
    reply = speaker.post("/v1/audio/speech", json={**SPEECH, "response_format": "pcm"})
    return np.frombuffer(reply.content, "<i2")


def samples_of(data: bytes, format: str) -> tuple[int, int]:
    """Samples and rate of a file."""
    if format == "pcm":
        return len(data) // 2, RATE
    with av.open(io.BytesIO(data)) as file:
        return sum(f.samples for f in file.decode(audio=0)), file.streams.audio[0].rate


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("speed", [0.5, 3])
def test_every_format_has_the_other_length(speaker, plain, format, speed):
    body = {**SPEECH, "response_format": format, "speed": speed}
    reply = speaker.post("/v1/audio/speech", json=body)
    assert reply.status_code == 200
    samples, rate = samples_of(reply.content, format)
    assert samples / rate == pytest.approx(len(plain) / RATE / speed, rel=0.02, abs=0.11)


def test_speech_is_what_the_filter_makes_of_it(speaker, plain):
    body = {**SPEECH, "response_format": "pcm", "speed": 1.25}
    reply = speaker.post("/v1/audio/speech", json=body)
    np.testing.assert_array_equal(np.frombuffer(reply.content, "<i2"), paced(plain, 1.25))


def test_sse_brings_the_same(speaker, plain):
    body = {**SPEECH, "response_format": "pcm", "speed": 2, "stream_format": "sse"}
    reply = speaker.post("/v1/audio/speech", json=body)
    events = [json.loads(block[6:]) for block in reply.text.split("\n\n") if block]
    assert [event["type"] for event in events][-1] == "speech.audio.done"
    data = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    np.testing.assert_array_equal(np.frombuffer(data, "<i2"), paced(plain, 2))


def test_speed_1_changes_nothing(speaker, plain):
    body = {**SPEECH, "response_format": "pcm", "speed": 1.0}
    reply = speaker.post("/v1/audio/speech", json=body)
    np.testing.assert_array_equal(np.frombuffer(reply.content, "<i2"), plain)


def test_a_very_short_speech_is_a_whole_file(site):
    body = {"model": "every", "input": "x", "count": 1, "speed": 4, "response_format": "wav"}
    reply = site.post("/v1/audio/speech", json=body)
    assert reply.content[:4] == b"RIFF"
    assert len(reply.content) == 44 + 2 * 60


@pytest.mark.parametrize(
    "value", [0, 0.249, 4.001, -1, float("nan"), float("inf"), True, "1", "fast", [1], {}, None]
)
def test_other_values_are_refused(value):
    with pytest.raises(InvalidRequest, match=r"must be a number from 0\.25 to 4"):
        check_speed(value)


def test_without_pyav_it_says_what_to_install(site, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    body = {"model": "every", "input": "x", "response_format": "wav"}
    reply = site.post("/v1/audio/speech", json={**body, "speed": 2})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "speed"
    assert "pip install 'mstar[server]'" in reply.json()["error"]["message"]
    assert site.post("/v1/audio/speech", json={**body, "speed": 1}).status_code == 200
