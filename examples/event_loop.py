"""Many requests from one event loop; the engine batches them.

python examples/event_loop.py
"""

from __future__ import annotations

import asyncio

from mstar import Engine


async def main() -> None:
    with Engine("orpheus-tiny") as engine:
        wanted = [
            {"text": "Hello there, how are you doing today?", "voice": "tara"},
            {"text": "The quick brown fox jumps over the lazy dog.", "voice": "leah"},
            {"text": "<laugh> It's 12345 o'clock!", "voice": "zac"},
        ]
        results = await asyncio.gather(*(engine.agenerate(**request) for request in wanted))
        for request, result in zip(wanted, results, strict=True):
            print(f"{result.usage.audio_seconds:.2f} s  {request['text']}")
        async for event in engine.astream(**wanted[0]):
            print(len(event.pcm), end=" ")
        print("\nbatches of the decoder:", engine.stats()["nodes"]["lm"]["batch_sizes"])


asyncio.run(main())
