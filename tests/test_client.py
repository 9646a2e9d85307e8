"""The vocabulary that Engine and the HTTP client share."""

import numpy as np
import pytest

from mstar import client
from mstar.client import AudioBuffer, GenerateMethods, GenerateResult, RequestFailed, TextChunk


class Recorder(GenerateMethods):
    """Remembers what reaches `generate`."""

    def __init__(self, result=None):
        self.result, self.calls = result or GenerateResult(), []

    def generate(self, *, output_modalities=("text",), stream=False, **kwargs):
        self.calls.append({"output_modalities": output_modalities, "stream": stream, **kwargs})
        return iter([TextChunk("a"), TextChunk("b")]) if stream else self.result


def test_chat_is_generate_with_a_prompt():
    engine = Recorder(GenerateResult(text="hello"))
    assert engine.chat("hi", images=b"png", audio=None, temperature=0.5, seed=None).text == "hello"
    assert engine.calls == [
        {
            "text": "hi",
            "images": b"png",
            "temperature": 0.5,
            "output_modalities": ("text",),
            "stream": False,
        }
    ]


def test_chat_can_stream():
    assert [event.text for event in Recorder().chat("hi", stream=True)] == ["a", "b"]


def test_tts_returns_the_sound():
    sound = AudioBuffer(np.zeros(4, np.int16), 24000)
    engine = Recorder(GenerateResult(audio=sound))
    assert engine.tts("hi", voice="leo") is sound
    assert engine.tts("hi", top_p=None) is sound
    first, second = engine.calls
    assert first["output_modalities"] == ("audio",)
    assert first["voice"] == "leo"
    assert "voice" not in second
    assert "top_p" not in second


def test_generate_image_returns_png_bytes():
    engine = Recorder(GenerateResult(images=[b"one", b"two"]))
    assert engine.generate_image("a cat", steps=3) == b"one"
    assert engine.calls[0]["output_modalities"] == ("image",)
    assert engine.calls[0]["steps"] == 3


def test_no_image_and_no_sound_are_errors():
    engine = Recorder(GenerateResult(finish_reason="length"))
    with pytest.raises(RequestFailed, match="length"):
        engine.generate_image("a cat")
    with pytest.raises(RequestFailed, match="no sound"):
        engine.tts("hi")


def test_stream_is_generate_with_events():
    engine = Recorder()
    assert len(list(engine.stream(text="hi", images=None))) == 2
    assert engine.calls == [{"output_modalities": ("text",), "stream": True, "text": "hi"}]


def test_results_events_and_errors_are_at_hand():
    import mstar.errors
    import mstar.types

    for module in (mstar.types, mstar.errors):
        for name in set(module.__all__) - {"fold", "nearest"}:
            assert getattr(client, name) is getattr(module, name)
