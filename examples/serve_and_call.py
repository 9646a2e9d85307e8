"""The server on a thread of this program, and two clients that call it.

python examples/serve_and_call.py
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from openai import OpenAI

from mstar import Engine, MStarClient
from mstar.http import create_app

TEXT = "Hello there, how are you doing today?"


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an app on a free port; the URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


with (
    Engine("orpheus-tiny") as engine,
    serving(create_app(engine)) as url,
):
    with MStarClient(url) as client:
        speech = client.tts(TEXT, voice="tara")
        print(f"MStarClient: {speech.seconds:.2f} s at {speech.sample_rate} Hz")
        for event in client.stream(text=TEXT, voice="tara"):
            print(len(event.pcm), end=" ")
        print(event.finish_reason, event.usage.generated_tokens, "tokens")

    with OpenAI(base_url=f"{url}/v1", api_key="none") as openai:
        print("openai:", *(model.id for model in openai.models.list()))
        mp3 = openai.audio.speech.create(model="orpheus-tiny", input=TEXT, voice="tara")
        mp3.write_to_file("hello.mp3")
        print(f"hello.mp3: {len(mp3.content)} bytes")
