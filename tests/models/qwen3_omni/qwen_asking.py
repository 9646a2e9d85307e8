"""The published cases as requests of an Engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

DATA = Path(__file__).parents[2] / "data" / "qwen3_omni"
GOLDEN = load_file(DATA / "goldens.safetensors")
CASES = json.loads((DATA / "goldens.json").read_text())["cases"]
SPOKEN = {"output_modalities": ("text", "audio"), "talker_temperature": 0.0}
SMALL_VIDEOS = {"video_min_pixels": 1024, "video_max_pixels": 786432}


def image_of(index):
    return GOLDEN[f"{index}.image0.rgb"]


def sound_of(index):
    return GOLDEN[f"{index}.audio0.waveform"], 16000


def video_of(index):
    return GOLDEN[f"{index}.video0.rgb"]


def request_of(index, **more):
    """A case of goldens.json as arguments of `generate`, greedy."""
    case = CASES[index]
    together = case["use_audio_in_video"]

    def medium(kind):
        if kind == "image":
            return image_of(index)
        if kind == "audio":
            return sound_of(index)
        return (video_of(index), sound_of(index)) if together else video_of(index)

    messages = []
    for message in case["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                part if part["type"] == "text" else {**part, part["type"]: medium(part["type"])}
                for part in content
            ]
        messages.append({**message, "content": content})
    options = SMALL_VIDEOS | {"use_audio_in_video": together, "fps": case["fps"] or 2.0}
    return {"messages": messages, **options, **more}


def pcm_of(wave):
    return (np.asarray(wave) * np.float32(32767)).astype(np.int16)


def assert_same_sound(found, expected):
    """Equal but for the last level here and there, which rounding decides."""
    assert found.shape == expected.shape
    assert not len(found) or np.abs(found.astype(int) - expected).max() <= 3


def assert_golden(index, result):
    """The text, and if it is spoken the sound, of a case."""
    case = CASES[index]
    assert result.text == case["response"]
    assert result.finish_reason == "stop"
    assert result.usage.prompt_tokens == case["n_prompt"]
    tokens = case["n_generated"]
    if result.audio is None:
        assert result.usage.generated_tokens == tokens
        return
    assert result.usage.generated_tokens == tokens + case["frames"]  # not counting the end
    assert result.usage.speech_tokens == case["frames"]
    found = result.audio.pcm
    assert len(found) == case["samples"]
    if f"{index}.wav" in GOLDEN:
        assert_same_sound(found, pcm_of(GOLDEN[f"{index}.wav"]))
    else:
        assert_same_sound(found[:6000], pcm_of(GOLDEN[f"{index}.wav_head"]))
        assert_same_sound(found[-6000:], pcm_of(GOLDEN[f"{index}.wav_tail"]))
