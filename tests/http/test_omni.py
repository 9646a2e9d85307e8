"""Qwen3-Omni behind OpenAI's routes, driven by openai-python with strict types."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import numpy as np
import pytest
import soundfile

from mstar import Engine
from mstar.http import create_app
from mstar.http.openai.surfaces import surfaces_of
from mstar.models import registry
from tests.http.conftest import Site, serving
from tests.http.pictures import data_url, strict

MODEL = "qwen3_omni-tiny"
HELLO = [{"role": "user", "content": "Say hello."}]
SHORT = {"model": MODEL, "seed": 3, "max_completion_tokens": 6}
SPOKEN = {"modalities": ["text", "audio"], "audio": {"voice": "Chelsie", "format": "wav"}}
BRIEF, LONGER = {"talker_max_tokens": 5}, {"talker_max_tokens": 16}


@pytest.fixture(scope="module")
def omni() -> Iterator[Site]:
    with Engine(MODEL) as engine, serving(engine, create_app(engine)) as site:
        yield site


@pytest.fixture(scope="module")
def client(omni):
    with strict(omni) as client:
        yield client


def wav(seconds: float = 0.5) -> bytes:
    out = io.BytesIO()
    tone = 0.1 * np.sin(np.arange(int(16000 * seconds)) / 9)
    soundfile.write(out, tone.astype(np.float32), 16000, format="WAV")
    return out.getvalue()


def png() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


def spoken(data: str) -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(base64.b64decode(data)), dtype="int16")


def part(kind: str, mime: str, data: bytes) -> dict:
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def test_it_has_chat_and_speech_and_no_images():
    surfaces = surfaces_of(registry.get("qwen3_omni"))
    assert surfaces.chat == ("text", "audio")
    assert surfaces.speech is not None
    assert surfaces.images is None


def test_a_chat_is_what_the_engine_says(client, omni):
    reply = client.chat.completions.create(messages=HELLO, **SHORT)
    said = omni.engine.generate(messages=HELLO, seed=3, max_tokens=6)
    assert reply.choices[0].message.content == said.text
    assert reply.choices[0].finish_reason == said.finish_reason
    assert reply.usage.prompt_tokens == said.usage.prompt_tokens
    assert reply.usage.completion_tokens == said.usage.generated_tokens


def test_images_and_sounds_are_parts_of_a_message(client):
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(png())}},
        {"type": "text", "text": "and"},
        {
            "type": "input_audio",
            "input_audio": {"data": base64.b64encode(wav()).decode(), "format": "wav"},
        },
        {"type": "text", "text": "What is this?"},
    ]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    reply = client.chat.completions.create(messages=messages, **SHORT)
    read, made = reply.usage.prompt_tokens_details, reply.usage.completion_tokens_details
    assert min(read.image_tokens, read.audio_tokens, read.text_tokens) > 0
    media = read.image_tokens + read.audio_tokens
    assert read.text_tokens + media == reply.usage.prompt_tokens
    assert made.text_tokens == reply.usage.completion_tokens <= 6


def test_videos_and_sounds_are_data_urls(client):
    import openai

    av = pytest.importorskip("av")
    film = io.BytesIO()
    with av.open(film, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 64
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    parts = [part("audio", "audio/wav", wav()), part("video", "video/mp4", film.getvalue())]
    reply = client.chat.completions.create(
        messages=[{"role": "user", "content": parts}],
        **SHORT,
        extra_body={"video_min_pixels": 1024},
    )
    assert reply.usage.prompt_tokens_details.image_tokens == 8
    parts[1] = part("video", "video/mp4", b"no film")
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content\[1\].video_url"):
        client.chat.completions.create(messages=[{"role": "user", "content": parts}], **SHORT)


def test_a_gif_is_a_video_if_it_moves(client):
    import openai
    from PIL import Image

    def gif(frames: int) -> dict:
        out, shades = io.BytesIO(), [Image.new("L", (64, 48), 60 * i) for i in range(frames)]
        shades[0].save(out, "GIF", save_all=True, append_images=shades[1:])
        return part("video", "image/gif", out.getvalue())

    def ask(frames: int):
        messages = [{"role": "user", "content": [gif(frames)]}]
        extra = {"video_min_pixels": 1024}
        return client.chat.completions.create(messages=messages, **SHORT, extra_body=extra)

    assert ask(4).usage.prompt_tokens_details.image_tokens > 0
    with pytest.raises(openai.BadRequestError, match="does not move"):
        ask(1)


def test_speech_comes_with_its_transcript(client, omni):
    reply = client.chat.completions.create(messages=HELLO, **SHORT, **SPOKEN, extra_body=BRIEF)
    said = omni.engine.generate(
        messages=HELLO,
        output_modalities=("text", "audio"),
        seed=3,
        max_tokens=6,
        voice="chelsie",
        **BRIEF,
    )
    message = reply.choices[0].message
    assert message.content is None
    assert message.audio.transcript == said.text
    pcm, rate = spoken(message.audio.data)
    assert rate == 24000
    assert (pcm == said.audio.pcm).all()
    made = reply.usage.completion_tokens_details
    assert (made.text_tokens > 0, made.audio_tokens) == (True, said.usage.speech_tokens)
    assert made.text_tokens + made.audio_tokens == said.usage.generated_tokens
    turns = [*HELLO, {"role": "assistant", "audio": {"id": message.audio.id}}, *HELLO]
    again = client.chat.completions.create(messages=turns, **SHORT).choices[0].message.content
    turns[1] = {"role": "assistant", "content": said.text}
    assert again == omni.engine.generate(messages=turns, seed=3, max_tokens=6).text


def test_streamed_speech_is_the_whole_speech(client):
    whole = client.chat.completions.create(messages=HELLO, **SHORT, **SPOKEN, extra_body=BRIEF)
    stream = client.chat.completions.create(
        messages=HELLO,
        **SHORT,
        modalities=["text", "audio"],
        audio={"voice": "Chelsie", "format": "pcm16"},
        extra_body=BRIEF,
        stream=True,
    )
    data, text = b"", ""
    for chunk in stream:
        for choice in chunk.choices:
            audio = (choice.delta.model_extra or {}).get("audio") or getattr(
                choice.delta, "audio", None
            )
            if audio is not None:
                audio = audio if isinstance(audio, dict) else audio.model_dump()
                data += base64.b64decode(audio.get("data") or "")
                text += audio.get("transcript") or ""
    message = whole.choices[0].message
    assert text == message.audio.transcript
    assert (np.frombuffer(data, "<i2") == spoken(message.audio.data)[0]).all()


def test_a_text_is_read_aloud(client, omni):
    fields = {"model": MODEL, "voice": "Ethan", "extra_body": {"seed": 5, **LONGER}}
    reply = client.audio.speech.create(input="Good morning.", response_format="wav", **fields)
    pcm, rate = soundfile.read(io.BytesIO(reply.content), dtype="int16")
    said = omni.engine.tts("Good morning.", seed=5, **LONGER)
    assert rate == 24000
    assert (pcm == said.pcm).all()


def _template(**values):
    return {"extra_body": {"chat_template_kwargs": values}}


def test_the_thought_of_the_chat_template_may_be_left_out(client, omni):
    reply = client.chat.completions.create(
        messages=HELLO, **SHORT, **_template(enable_thinking=False)
    )
    said = omni.engine.generate(messages=HELLO, seed=3, max_tokens=6, enable_thinking=False)
    assert reply.choices[0].message.content == said.text
    assert reply.usage.prompt_tokens == said.usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"audio": {"voice": "Nobody", "format": "wav"}, "modalities": ["text", "audio"]},
            "Chelsie",
        ),
        ({"modalities": ["image"]}, "modalities"),
        ({"extra_body": {"talker_top_p": 3}}, "talker_top_p"),
        (_template(enable_thinking=3), "chat_template_kwargs.enable_thinking=3"),
        (_template(tools="x"), "chat_template_kwargs"),
    ],
)
def test_what_it_does_not_have_is_refused_with_what_it_has(client, fields, words):
    import openai

    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(messages=HELLO, **SHORT, **fields)
