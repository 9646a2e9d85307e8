"""Text to a WAV file.

python examples/speak.py "Hello there, how are you doing today?" hello.wav
"""

from __future__ import annotations

import sys

from mstar import Engine

TEXT = "Hello there, how are you doing today?"

text, path = sys.argv[1:3] if len(sys.argv) > 2 else (TEXT, "hello.wav")
with Engine("orpheus-tiny") as engine:
    speech = engine.tts(text, voice="tara", seed=7)
    speech.to_wav(path)
    print(f"{path}: {speech.seconds:.2f} s at {speech.sample_rate} Hz")
