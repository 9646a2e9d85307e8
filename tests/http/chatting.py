"""What the tests of the chat route share."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mstar.types import AudioBuffer

openai = pytest.importorskip("openai")

HELLO = [{"role": "user", "content": "hello"}]


def small_png(shade: int = 0) -> bytes:
    """A real PNG."""
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(out, "PNG")
    return out.getvalue()


def small_wav() -> bytes:
    """A real WAV."""
    return AudioBuffer(np.zeros(160, np.int16), 16000).to_wav()


def data_url(data: bytes, kind: str = "image/png") -> str:
    """The bytes in a URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def client(site):
    """openai-python, which refuses any reply that its types do not allow."""
    with openai.OpenAI(
        base_url=f"{site.url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


def ask(client: Any, **fields: Any) -> Any:
    """A completion of the test model; fields that openai-python does not know go along."""
    own = ("count", "tell", "pause", "late_poison", "hang", "steps", "width", "height")
    extra = {name: fields.pop(name) for name in own if name in fields}
    extra |= fields.pop("extra_body", {})
    fields.setdefault("messages", HELLO)
    return client.chat.completions.create(model="every", extra_body=extra, **fields)


def told(client: Any, **fields: Any) -> dict[str, Any]:
    """What the model was given."""
    return json.loads(ask(client, tell=True, **fields).choices[0].message.content)


def post(site: Any, **fields: Any) -> Any:
    """The request without a client between."""
    return site.post("/v1/chat/completions", json={"model": "every", "messages": HELLO, **fields})


def events_of(reply: Any) -> list[dict[str, Any]]:
    """The events of a stream; the last one must be `[DONE]`."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    *blocks, last, end = reply.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]
