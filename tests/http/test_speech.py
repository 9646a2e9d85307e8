"""`/v1/audio/speech` and `/v1/models`, driven by openai-python."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import numpy as np
import pytest
import requests

openai = pytest.importorskip("openai")
av = pytest.importorskip("av")

TEXT = {"model": "orpheus-tiny", "input": "hello there", "voice": "tara"}
SHORT = {"max_tokens": 200, "ignore_eos": True, "seed": 3}


@pytest.fixture(scope="module")
def client(speaker):
    with openai.OpenAI(
        base_url=f"{speaker.url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


@pytest.fixture(scope="module")
def spoken(speaker) -> np.ndarray:
    """What the engine itself makes of the request."""
    events = speaker.engine.generate(text="hello there", voice="tara", stream=True, **SHORT)
    return np.concatenate([event.pcm for event in events])


def speak(client, format: str = "pcm", **kwargs):
    return client.audio.speech.create(**TEXT, response_format=format, extra_body=SHORT, **kwargs)


def test_pcm_is_what_the_engine_makes(client, spoken):
    reply = speak(client)
    headers = reply.response.headers
    assert headers["content-type"] == "audio/pcm"
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    assert reply.content == spoken.astype("<i2").tobytes()


@pytest.mark.parametrize(
    ("format", "content_type", "container"),
    [
        ("mp3", "audio/mpeg", "mp3"),
        ("opus", "audio/ogg", "ogg"),
        ("aac", "audio/aac", "aac"),
        ("flac", "audio/flac", "flac"),
        ("wav", "audio/wav", "wav"),
    ],
)
def test_formats_hold_the_whole_speech(client, spoken, format, content_type, container):
    reply = speak(client, format)
    assert reply.response.headers["content-type"] == content_type
    with av.open(io.BytesIO(reply.content)) as file:
        assert file.format.name == container
        rate = file.streams.audio[0].rate
        samples = sum(frame.samples for frame in file.decode(audio=0))
    assert samples / rate == pytest.approx(len(spoken) / 24000, abs=0.11)


def test_flac_keeps_every_sample(client, spoken):
    with av.open(io.BytesIO(speak(client, "flac").content)) as file:
        samples = np.concatenate([frame.to_ndarray().ravel() for frame in file.decode(audio=0)])
    np.testing.assert_array_equal(samples, spoken)


def test_mp3_is_the_default(client):
    reply = client.audio.speech.create(**TEXT, extra_body=SHORT)
    assert reply.response.headers["content-type"] == "audio/mpeg"


def test_a_streamed_wav_has_no_length_yet(client, spoken):
    create = client.audio.speech.with_streaming_response.create
    with create(**TEXT, response_format="wav", extra_body=SHORT) as reply:
        pieces = list(reply.iter_bytes())
    data = b"".join(pieces)
    assert data[:4] == b"RIFF"
    assert data[4:8] == data[40:44] == b"\xff\xff\xff\xff"
    assert data[44:] == spoken.astype("<i2").tobytes()
    assert len(pieces) > 1


def test_sse_brings_the_same_audio_and_a_usage(speaker, spoken):
    body = {**TEXT, **SHORT, "response_format": "pcm", "stream_format": "sse"}
    reply = speaker.post("/v1/audio/speech", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = reply.text.split("\n\n")
    assert blocks.pop() == ""
    events = [json.loads(block.removeprefix("data: ")) for block in blocks]
    *deltas, done = events
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    audio = b"".join(base64.b64decode(event["audio"]) for event in deltas)
    assert audio == spoken.astype("<i2").tobytes()
    assert done["type"] == "speech.audio.done"
    usage = done["usage"]
    assert usage["output_tokens"] == 200
    assert usage["total_tokens"] == usage["input_tokens"] + 200


def test_the_async_client_speaks_too(speaker, spoken):
    async def main() -> bytes:
        async with openai.AsyncOpenAI(base_url=f"{speaker.url}/v1", api_key="none") as client:
            replies = await asyncio.gather(*[speak(client) for _ in range(3)])
            return [reply.content for reply in replies]

    assert asyncio.run(main()) == [spoken.astype("<i2").tobytes()] * 3


def test_names_and_voices_have_other_forms(client, spoken):
    voice = {**TEXT, "model": "tts-1", "voice": {"id": "tara"}}
    reply = client.audio.speech.create(**voice, response_format="pcm", extra_body=SHORT)
    assert reply.content == spoken.astype("<i2").tobytes()


def test_parameters_may_be_nested_in_extra_body(speaker, spoken):
    body = {**TEXT, "extra_body": SHORT, "response_format": "pcm", "speed": 1.0}
    reply = speaker.post("/v1/audio/speech", json=body)
    assert reply.content == spoken.astype("<i2").tobytes()


def test_unknown_fields_are_ignored_with_one_log_line(speaker, caplog):
    body = {**TEXT, **SHORT, "response_format": "pcm", "sparkle": 1, "glitter": 2}
    with caplog.at_level("WARNING", "mstar.http"):
        assert speaker.post("/v1/audio/speech", json=body).status_code == 200
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "ignored fields that orpheus does not have: 'sparkle', 'glitter'"


@pytest.mark.parametrize("field", ["max_tokens", "max_output_tokens"])
def test_no_sound_is_an_error_that_names_the_limit_and_not_an_empty_file(client, field):
    with pytest.raises(openai.BadRequestError, match="is too few to make any sound") as error:
        client.audio.speech.create(**TEXT, extra_body={field: 1})
    assert (error.value.param, error.value.code) == (field, "invalid_value")


def test_a_speech_that_breaks_off_is_not_taken_for_a_whole_one(site):
    body = {"model": "every", "input": "x", "response_format": "pcm", "late_poison": True}
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        site.post("/v1/audio/speech", json=body)
    reply = site.post("/v1/audio/speech", json={**body, "stream_format": "sse"})
    last = json.loads(reply.text.split("\n\n")[-2].removeprefix("data: "))
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "poison in the batch" in last["error"]["message"]


def test_models_are_listed_under_all_their_names(client, site):
    assert [model.id for model in client.models.list()] == ["tts-1", "orpheus-tiny", "orpheus"]
    assert client.models.retrieve("tts-1").owned_by == "mstar"
    assert site.get("/v1/models/org/name").json()["id"] == "org/name"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-9")
    assert error.value.code == "model_not_found"
    assert error.value.param == "model"


def test_errors_are_those_of_openai(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.audio.speech.create(**{**TEXT, "voice": "alloy"})
    assert error.value.param == "voice"
    assert "tara" in error.value.message
    assert error.value.request_id.startswith("req-")


def test_a_surface_that_the_model_lacks_names_the_one_to_use(client):
    with pytest.raises(openai.NotFoundError, match="use POST /v1/audio/speech"):
        client.chat.completions.create(model="orpheus-tiny", messages=[])
    with pytest.raises(openai.NotFoundError, match="use POST /v1/audio/speech"):
        client.images.generate(model="orpheus-tiny", prompt="a cat")
