"""What Qwen3-Omni refuses, and what odd sounds and videos become."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from qwen_asking import CASES, image_of, request_of, sound_of, video_of
from test_qwen_media import film

from mstar import ContextTooLong, Engine, InvalidRequest


@pytest.fixture(scope="module")
def engine():
    with Engine("qwen3_omni-tiny", kv_tokens=2048) as engine:
        yield engine


def user(*parts, role="user"):
    return {"messages": [{"role": role, "content": list(parts)}]}


def text(words):
    return {"type": "text", "text": words}


SPOKEN = {"output_modalities": ("text", "audio")}
SECOND = np.zeros(16000, np.float32), 16000
BAD = [
    ({"text": " \n"}, "text", "is empty"),
    ({}, "text", "nothing was given"),
    (user(), "messages", "neither text nor media"),
    (user(text("x"), role="tool"), "messages", "role must be one of system, user, assistant"),
    (user({"type": "smell", "smell": b"x"}), "messages", "parts are"),
    (user({"type": "image", "image": image_of(1)}, role="system"), "messages", "text only"),
    ({"text": "x", "output_modalities": ("image",)}, "output_modalities", "text, audio only"),
    ({"text": "x", "voice": "alloy"}, "voice", "one of Aiden, Chelsie, Ethan"),
    ({"text": "x", "voice": "alloy", **SPOKEN}, "voice", "one of Aiden, Chelsie, Ethan"),
    ({"text": "x", "audio": SECOND, "read_aloud": True, **SPOKEN}, "read_aloud", "no media"),
    ({"text": "x", "read_aloud": True}, "read_aloud", "goes with output_modalities"),
    ({**user(text("x"), role="system"), "system": "y"}, "system", "a system turn already"),
    ({"text": "x", "audio": b""}, "audio", "no audio"),
    ({"text": "x", "audio": b"RIFF and so on"}, "audio", ""),
    ({"text": "x", "audio": (np.zeros(100, np.float32), 16000)}, "audio", "10 at least"),
    ({"text": "x", "audio": (np.full(400, np.nan, np.float32), 16000)}, "audio", "no numbers"),
    ({"text": "x", "audio": (np.full(400, 1e19, np.float32), 16000)}, "audio", "beyond"),
    ({"text": "x", "audio": (SECOND[0], 0)}, "audio", "a number of Hz"),
    ({"text": "x", "images": b"no image"}, "images", "no image"),
    ({"text": "x", "images": np.zeros((4, 900, 3), np.uint8)}, "images", "200 times"),
    ({"text": "x", "video": video_of(4)[:0]}, "video", "no frames"),
    (
        {"text": "x", "video": (video_of(4), (SECOND[0], 0)), "use_audio_in_video": True},
        *("video", "its sound: sample_rate=0"),
    ),
    ({"text": "x", "video": b"no film"}, "video", ""),
    ({"text": "x", "video": video_of(4), "max_frames": 3, "min_frames": 1}, "video", "4 frames"),
    ({"text": "x", "fps": 0}, "fps", "above 0"),
    ({"text": "x", "min_frames": 9, "max_frames": 8}, "min_frames", "exceed max_frames=8"),
    ({"text": "x", "min_pixels": 9, "max_pixels": 8}, "min_pixels", "exceed max_pixels=8"),
    ({"text": "x", "max_tokens": 4, "min_tokens": 5}, "min_tokens", "exceed"),
    ({"text": "x", "max_tokens": 2000, "thinker_max_tokens": 2000}, "thinker_max_tokens", "same"),
    ({"text": "x", "max_tokens": 2048}, "max_output_tokens", "there is room for 20"),
    ({"text": "x", "talker_max_tokens": 2048, **SPOKEN}, "talker_max_tokens", "there is room for"),
    ({"text": "x", "talker_temperature": -1}, "talker_temperature", "from 0 to 100"),
    ({"text": "x", "code_predictor_top_p": 0}, "code_predictor_top_p", "above 0"),
]
LONG = [
    ({"text": "word " * 3000}, "text", "KV cache"),
    ({"text": "word " * 80000}, "text", "the model takes 65536"),
    ({"text": "x", "audio": (np.zeros(16000 * 200, np.float32), 16000)}, "audio", "KV cache"),
    ({"text": "x", "images": [image_of(1)] * 90, "min_pixels": 65536}, "images", "KV cache"),
    (user(text("word " * 3000)), "messages", "KV cache"),
    ({"text": "word " * 509, **SPOKEN}, "text", "the Talker's KV cache"),
    ({"text": "word " * 40, "output_modalities": ("audio",), "talker_max_tokens": 9}, "text", "9"),
]


ALL = [*((InvalidRequest, *bad) for bad in BAD), *((ContextTooLong, *long) for long in LONG)]


@pytest.mark.parametrize(("error", "asked", "field", "says"), ALL, ids=lambda part: str(part)[:30])
def test_it_is_refused_by_name_before_anything_runs(engine, error, asked, field, says):
    before = engine.stats()["nodes"]["thinker"]["calls"]
    with pytest.raises(error) as refused:
        engine.generate(**asked)
    assert refused.value.field == field
    assert says in str(refused.value)
    assert engine.stats()["nodes"]["thinker"]["calls"] == before


def wav(samples, rate, subtype):
    out = io.BytesIO()
    soundfile.write(out, samples, rate, subtype, format="WAV")
    return out.getvalue()


def heard(value):
    """What the engine makes of a sound in place of that of the published case."""
    asked = request_of(2)
    asked["messages"][0]["content"][0]["audio"] = value
    return asked


def high_rate(samples):
    places = np.arange(6 * len(samples)) / 6
    return np.interp(places, np.arange(len(samples)), samples)


ODD = {
    "8 bit": lambda clip: wav(clip, 16000, "PCM_U8"),
    "16 bit": lambda clip: wav(clip, 16000, "PCM_16"),
    "stereo": lambda clip: wav(np.stack([clip, clip], 1), 16000, "FLOAT"),
    "96 kHz": lambda clip: wav(high_rate(clip), 96000, "PCM_24"),
    "integers": lambda clip: ((clip * 32767).astype(np.int16), 16000),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_sounds_are_heard(engine, kind):
    clip, _ = sound_of(2)
    result = engine.generate(**heard(ODD[kind](clip)))
    assert result.text == CASES[2]["response"]
    assert result.usage.prompt_tokens == CASES[2]["n_prompt"]


def test_a_truncated_sound_is_refused(engine):
    with pytest.raises(InvalidRequest, match="cut off"):
        engine.generate(**heard(wav(sound_of(2)[0], 16000, "PCM_16")[:-4000]))


def test_silence_is_heard(engine):
    assert engine.generate(**heard(SECOND)).finish_reason == "stop"


def test_one_frame_is_a_video(engine):
    asked = request_of(4)
    asked["messages"][0]["content"][0]["video"] = video_of(4)[:1]
    assert engine.generate(**asked).usage.image_tokens == 4


def test_a_film_is_seen_and_if_asked_for_heard(engine):
    """3.7 seconds: 6 of 37 frames, 3 times of 4 tokens; and 2 seconds of sound."""
    size = {"video_min_pixels": 4096, "video_max_pixels": 4096}
    asked = {"text": "What do you see?", "video": film(sound=2), **size}
    silent, sounding, mute = engine.generate_batch(
        [
            asked,
            {**asked, "use_audio_in_video": True},
            {**asked, "video": film(), "use_audio_in_video": True},
        ]
    )
    tokens = engine.model.omni.audio.config.tokens
    assert silent.usage.image_tokens == sounding.usage.image_tokens == 12
    more = sounding.usage.prompt_tokens - silent.usage.prompt_tokens
    assert (silent.usage.audio_tokens, sounding.usage.audio_tokens) == (0, more - 2)
    assert tokens(200) <= more - 2 <= tokens(210)  # the codec may pad; two marks
    assert mute.text == silent.text
    assert mute.usage.prompt_tokens == silent.usage.prompt_tokens
    (short,) = engine.generate_batch([{**asked, "fps": 0.5, "min_frames": 2}])
    assert short.usage.image_tokens == 4


def test_marks_in_a_text_are_no_media(engine):
    result = engine.generate(text="<|audio_pad|><|image_pad|> hello", max_tokens=3)
    assert result.usage.image_tokens == 0
