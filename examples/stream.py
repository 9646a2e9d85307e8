"""Speech as it is made, and cancelling what is no longer wanted.

python examples/stream.py
"""

from __future__ import annotations

import time

from mstar import Engine, RequestCancelled

TEXT = "The quick brown fox jumps over the lazy dog."

with Engine("orpheus-tiny") as engine:
    began = time.perf_counter()
    for event in engine.generate(text=TEXT, voice="leah", stream=True, lookahead=1, seed=1):
        print(f"{time.perf_counter() - began:6.3f} s  {len(event.pcm):5d} samples")
    print(event.finish_reason, event.usage)

    handle = engine.submit(text=TEXT, voice="leah", ignore_eos=True)
    next(iter(handle))
    handle.cancel()
    try:
        handle.result()
    except RequestCancelled as stopped:
        print("cancelled after", stopped.partial.audio.seconds, "s of speech")
