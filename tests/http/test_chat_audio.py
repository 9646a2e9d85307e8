"""Sound in chats: whole and streamed, at OpenAI's rate, and referred to later."""

from __future__ import annotations

import base64
import builtins
import io
import time
import wave

import numpy as np
import pytest

from mstar.errors import InvalidRequest
from mstar.http.encoders import PCM_RATE, check_encoder, encode_whole, open_encoder
from tests.http.chatting import HELLO, ask, client, events_of, openai, post, told  # noqa: F401

av = pytest.importorskip("av")

SPOKEN = {"modalities": ["text", "audio"], "audio": {"voice": "Ethan", "format": "pcm16"}}
PCM = np.repeat(np.arange(3), 240).astype("<i2").tobytes()


def in_format(format: str) -> dict:
    return {**SPOKEN, "audio": {"voice": "Ethan", "format": format}}


def test_sound_takes_the_place_of_the_text(client):  # noqa: F811
    reply = ask(client, **SPOKEN)
    message = reply.choices[0].message
    assert message.content is None
    assert message.audio.id.startswith("audio_")
    assert message.audio.transcript == "0 1 2 "
    assert base64.b64decode(message.audio.data) == PCM
    assert 3000 < message.audio.expires_at - time.time() < 4000
    assert reply.usage.completion_tokens_details.text_tokens is None


@pytest.mark.parametrize(
    ("format", "container"), [("mp3", "mp3"), ("opus", "ogg"), ("aac", "aac"), ("flac", "flac")]
)
def test_formats_hold_the_whole_sound(client, format, container):  # noqa: F811
    audio = ask(client, **in_format(format), count=50).choices[0].message.audio
    with av.open(io.BytesIO(base64.b64decode(audio.data))) as file:
        assert file.format.name == container
        rate = file.streams.audio[0].rate
        samples = sum(frame.samples for frame in file.decode(audio=0))
    assert samples / rate == pytest.approx(0.5, abs=0.11)


@pytest.mark.parametrize("fields", [in_format("wav"), {"modalities": ["text", "audio"]}])
def test_a_wav_says_how_long_it_is(site, fields):
    audio = post(site, **fields).json()["choices"][0]["message"]["audio"]
    with wave.open(io.BytesIO(base64.b64decode(audio["data"]))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (24000, 1, 720)


def test_no_sound_leaves_the_text(client):  # noqa: F811
    message = ask(client, **SPOKEN, count=0).choices[0].message
    assert (message.content, message.audio) == ("", None)


@pytest.mark.parametrize("voice", ["Chelsie", {"id": "Chelsie"}])
def test_the_voice_is_a_parameter(client, voice):  # noqa: F811
    fields = {"modalities": ["text", "audio"], "audio": {"voice": voice, "format": "wav"}}
    given = told(client, **fields)
    assert given["params"]["voice"] == "Chelsie"
    assert given["outputs"] == ["text", "audio"]


def test_probabilities_go_with_the_transcript(client):  # noqa: F811
    choice = ask(client, **SPOKEN, logprobs=True).choices[0]
    assert "".join(token.token for token in choice.logprobs.content) == "0 1 2 "


def test_streamed_sound_is_typed_as_openai_types_it(client):  # noqa: F811
    chunks = list(ask(client, stream=True, **SPOKEN))
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert first.delta.role == "assistant"
    pieces = [choice.delta.audio for choice in middle]
    assert all(piece is not None for piece in pieces)
    assert [piece.id is not None for piece in pieces].count(True) == 1
    assert pieces[0].id.startswith("audio_")
    assert "".join(piece.transcript or "" for piece in pieces) == "0 1 2 "
    assert b"".join(base64.b64decode(piece.data or "") for piece in pieces) == PCM
    assert pieces[-1].model_dump(exclude_unset=True).keys() == {"expires_at"}
    assert "finish_reason" not in middle[-1].model_dump(exclude_unset=True)
    assert (last.finish_reason, last.delta.audio) == ("stop", None)


def test_each_choice_has_a_sound_of_its_own(client):  # noqa: F811
    data, ids = {}, {}
    for chunk in ask(client, stream=True, n=2, pause=0.01, **SPOKEN):
        choice = chunk.choices[0]
        if choice.delta.audio is not None:
            piece = base64.b64decode(choice.delta.audio.data or "")
            data[choice.index] = data.get(choice.index, b"") + piece
            ids.setdefault(choice.index, choice.delta.audio.id)
    assert data == {0: PCM, 1: PCM}
    assert ids[0] != ids[1]


@pytest.mark.parametrize("stream", [False, True])
def test_later_messages_refer_back_to_sound(site, client, stream):  # noqa: F811
    if stream:
        chunks = [chunk.choices[0].delta for chunk in ask(client, stream=True, **SPOKEN)]
        id = next(delta.audio.id for delta in chunks if delta.audio is not None)
        earlier = {"role": "assistant", "audio": {"id": id}}
    else:
        earlier = ask(client, **SPOKEN).choices[0].message.model_dump()
    given = told(client, messages=[*HELLO, earlier, {"role": "user", "content": "and?"}])
    assert given["messages"][1] == {"role": "assistant", "content": "0 1 2 "}


# -- samples at another rate ---------------------------------------------------------------------


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    time_axis = np.arange(int(rate * seconds)) / rate
    return (np.sin(2 * np.pi * hertz * time_axis) * 16000).astype(np.int16)


def pitch_of(pcm: np.ndarray) -> float:
    """The strongest frequency, in Hz, of samples at OpenAI's rate."""
    strength = np.abs(np.fft.rfft(pcm * np.hanning(len(pcm))))
    return float(np.argmax(strength)) * PCM_RATE / len(pcm)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("step", [160, 1013, 10**6])
def test_samples_keep_pitch_and_length_at_another_rate(rate, step):
    encoder = open_encoder("pcm", rate)
    pcm = tone(rate)
    pieces = [encoder.push(pcm[start : start + step]) for start in range(0, len(pcm), step)]
    out = np.frombuffer(b"".join([*pieces, encoder.finish()]), "<i2")
    assert abs(len(out) - PCM_RATE) <= 2
    assert pitch_of(out) == pytest.approx(440, abs=1.5)
    inner = slice(200, -200)
    assert np.abs(out[inner].astype(int)).max() == pytest.approx(16000, rel=0.02)
    assert np.corrcoef(out[inner], tone(PCM_RATE)[: len(out)][inner])[0, 1] > 0.999


def test_pieces_do_not_change_what_comes_out():
    pcm = tone(16000)
    encoder = open_encoder("pcm", 16000)
    pieces = [encoder.push(pcm[start : start + 333]) for start in range(0, len(pcm), 333)]
    assert b"".join([*pieces, encoder.finish()]) == encode_whole("pcm", pcm, 16000)
    assert sum(map(bool, pieces)) > len(pieces) // 2


def test_samples_at_openais_rate_stay_as_they_are():
    assert encode_whole("pcm", tone(PCM_RATE), PCM_RATE) == tone(PCM_RATE).tobytes()
    assert encode_whole("pcm", np.zeros(0, np.int16), 16000) == b""


def test_without_pyav_other_rates_are_refused(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    check_encoder("pcm", PCM_RATE)
    check_encoder("wav", 16000)
    with pytest.raises(InvalidRequest, match=r"audio\.format='pcm': needs PyAV"):
        check_encoder("pcm", 16000, field="audio.format")


@pytest.fixture
def slow_site(site, monkeypatch):
    """The test model makes sound at 16 kHz."""
    monkeypatch.setattr(site.engine.model, "sample_rate", 16000)
    return site


def test_routes_bring_samples_at_openais_rate(slow_site, client):  # noqa: F811
    audio = ask(client, **SPOKEN, count=100).choices[0].message.audio
    whole = np.frombuffer(base64.b64decode(audio.data), "<i2")
    assert abs(len(whole) - 36000) <= 2
    body = {"model": "every", "input": "x", "response_format": "pcm", "count": 100}
    assert slow_site.post("/v1/audio/speech", json=body).content == whole.tobytes()
    events = events_of(post(slow_site, stream=True, count=100, **SPOKEN))
    pieces = [event["choices"][0]["delta"].get("audio", {}).get("data", "") for event in events]
    assert b"".join(map(base64.b64decode, pieces)) == whole.tobytes()


def test_files_keep_the_models_rate(slow_site):
    audio = post(slow_site, **in_format("wav")).json()["choices"][0]["message"]["audio"]
    with wave.open(io.BytesIO(base64.b64decode(audio["data"]))) as file:
        assert (file.getframerate(), file.getnframes()) == (16000, 720)
