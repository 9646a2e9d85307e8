"""A server that speaks OpenAI's protocols with odd but legal habits, and can misbehave on request.

What it does is named by the prompt: see `CHAT`, `SPEECH` and `IMAGES`.
"""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

SECOND = b"\0" * 48000
DONE = "data: [DONE]\n\n"


def chunk(delta: dict | None = None, **more: Any) -> str:
    """A chunk of chat, as an SSE event."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": None}]
    return f"data: {json.dumps({'choices': choices, **more})}\n\n"


def stop(**more: Any) -> str:
    choice = {"index": 0, "delta": {}, "finish_reason": "stop"}
    return f"data: {json.dumps({'choices': [choice], **more})}\n\n"


USAGE = {"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19}
WORDS = [chunk({"content": word}) for word in ("one ", "two ", "three ", "four")]
SOUND = base64.b64encode(SECOND[:24000]).decode()  # half a second

# prompt -> the pieces of the body; a number is a pause in seconds
CHAT: dict[str, list[str | float]] = {
    "plain": [chunk({"role": "assistant", "content": ""}), *WORDS, stop(), DONE],
    "usage": [*WORDS, stop(usage=None), chunk(usage=USAGE), DONE],
    "odd": [
        ": connected\r\n\r\n",
        'event: message\r\ndata:{"choices": null, "strange": [1, {}]}\r\n\r\n',
        ": ping\n\n",
        chunk({"role": "assistant", "content": None, "new_key": {"a": 1}}),
        chunk({"reasoning_content": "hm"}).replace("\n", "\r\n"),
        *(word.replace("\n", "\r") for word in WORDS),
        chunk(),
        stop(usage={"completion_tokens": 5, "prompt_tokens": None}),
        "data: [DONE]",
    ],
    "no done": [*WORDS, stop()],
    "paced": [WORDS[0], 0.1, WORDS[1], 0.1, WORDS[2], stop(), DONE],
    "lingers": [*WORDS, stop(), DONE, 1.2],
    "speaks": [
        chunk({"audio": {"id": "a"}}),
        chunk({"audio": {"transcript": "hi "}}),
        chunk({"audio": {"data": SOUND}}),
        0.8,
        chunk({"audio": {"data": SOUND, "transcript": "you"}}),
        chunk({"audio": {"expires_at": 1}}),
        stop(),
        DONE,
    ],
    "stalls": [WORDS[0], 1.0],
    "cut": [*WORDS, chunk({"content": "and"})],
    "error": [WORDS[0], 'data: {"error": {"message": "the GPU fell over", "code": null}}\n\n'],
    "nonsense": [WORDS[0], "data: {oops\n\n"],
    "empty": [stop(), DONE],
}
STATUS = {"500": 500, "429": 429, "503": 503}


class Stub:
    """The ASGI app; `seen` are the requests: path, headers, body."""

    def __init__(self, paths: tuple[str, ...] = (), key: str | None = None) -> None:
        self.paths, self.key = paths, key
        self.seen: list[tuple[str, dict[str, str], bytes]] = []

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        path = scope["path"]
        self.seen.append((path, headers, body))
        await self._answer(path, headers, body, Sender(send))

    async def _answer(self, path: str, headers: dict, body: bytes, to: Sender) -> None:
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            await to.json(401, {"error": {"message": "wrong key"}})
        elif path == "/v1/models" and "models" in self.paths:
            await to.json(200, {"object": "list", "data": [{"id": "stub-1"}, {"id": "stub-2"}]})
        elif path.removeprefix("/v1/") not in self.paths:
            await to.json(404, {"detail": "Not Found"})
        elif body == b"{}":
            await to.json(422, {"detail": [{"loc": ["model"], "msg": "missing"}]})
        elif path == "/v1/images/edits":
            await to.json(200, {"data": [{"b64_json": "aaaa"}], "extra": 1})
        else:
            await getattr(self, path.split("/")[2])(json.loads(body), to)

    async def chat(self, body: dict, to: Sender) -> None:
        content = body["messages"][-1]["content"]
        prompt = content if isinstance(content, str) else content[-1]["text"]
        if prompt in STATUS:
            error = {"error": {"message": f"no luck {prompt}", "type": "x"}}
            await to.json(STATUS[prompt], error)
        elif prompt == "whole":
            choice = {"message": {"content": "all at once"}, "finish_reason": "stop"}
            await to.json(200, {"choices": [choice], "usage": USAGE})
        else:
            await to.stream("text/event-stream; charset=utf-8", CHAT[prompt])
            if prompt == "cut":
                raise ConnectionAbortedError

    async def audio(self, body: dict, to: Sender) -> None:
        prompt = body["input"]
        if body.get("stream_format") == "sse":
            delta = {"type": "speech.audio.delta", "audio": SOUND}
            done = {"type": "speech.audio.done", "usage": {"input_tokens": 3, "output_tokens": 9}}
            pieces = [f"data: {json.dumps(event)}\n\n" for event in (delta, delta, done)]
            await to.stream("text/event-stream", pieces)
        elif prompt == "late":
            pieces = [SECOND[:9600], 0.5, SECOND[:4801], SECOND[:4799]]
            await to.stream("audio/pcm", pieces)
        elif prompt == "mp3":
            await to.stream("audio/mpeg", [b"ID3abc", b"abc"])
        else:
            await to.stream("audio/L16;rate=48000;channels=1", [SECOND, SECOND])

    async def images(self, body: dict, to: Sender) -> None:
        if body.get("stream"):
            partial = {"type": "image_generation.partial_image", "b64_json": "aa"}
            done = {"type": "image_generation.completed", "b64_json": "aaaa"}
            pieces = [f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in (partial, done)]
            await to.stream("text/event-stream", pieces)
        else:
            await to.json(200, {"created": 1, "data": [{"b64_json": "aaaa"}, {"url": "http://x"}]})


class Sender:
    """Sends a reply."""

    def __init__(self, send: Any) -> None:
        self.send = send

    async def json(self, status: int, body: Any) -> None:
        await self._start(status, "application/json")
        await self.send({"type": "http.response.body", "body": json.dumps(body).encode()})

    async def stream(self, content_type: str, pieces: list) -> None:
        await self._start(200, content_type)
        for piece in pieces:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
                continue
            data = piece.encode() if isinstance(piece, str) else piece
            await self.send({"type": "http.response.body", "body": data, "more_body": True})
        if pieces[-1:] != CHAT["cut"][-1:]:
            await self.send({"type": "http.response.body", "body": b""})

    async def _start(self, status: int, content_type: str) -> None:
        headers = [(b"content-type", content_type.encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
