"""A question about an image, answered in text and speech as they are made.

python examples/qwen3_omni_chat.py image.png "What is this?" answer.wav
"""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

from mstar import Engine
from mstar.types import TextChunk, fold

if len(sys.argv) == 4:
    image, question, path = sys.argv[1:]
elif len(sys.argv) > 1:
    sys.exit(__doc__)
else:
    question, path = "Describe the picture in one sentence.", "answer.wav"
    image = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(image).line((20, 30, 70, 30), "red", 5)

with Engine("qwen3_omni-tiny") as engine:
    events = []
    for event in engine.stream(
        text=question, images=[image], output_modalities=("text", "audio"), voice="Chelsie", seed=1
    ):
        events.append(event)
        if isinstance(event, TextChunk):
            print(event.text, end="", flush=True)
        else:
            print(f" ({len(event.pcm) / event.sample_rate:.2f} s)", end="", flush=True)
    answer = fold(events)
    answer.save_audio(path)
    print(f"\n{path}: {answer.audio.seconds:.2f} s; {answer.usage}")
