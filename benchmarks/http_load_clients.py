"""The clients of `http_load.py`: what they ask for, when they leave, and what they make of it."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from urllib.parse import urlencode

LEAVING = 0.2  # of the requests are left alone before they are done
LONGEST = 60.0  # seconds that a request may take
PACE = {"count": 24, "pause": 0.085}  # the chunks of a voice, at the pace of speech
SHORT = {"max_tokens": 84, "ignore_eos": True, "seed": 1}
NATIVE, SPEECH = "/generate", "/v1/audio/speech"
# Per model, what clients ask for: the path, the fields, and what the end of a whole answer has.
Kind = tuple[str, dict, str]


def native(modality: str, knobs: dict) -> Kind:
    fields = {"text": "hello", "output_modalities": modality, "model_kwargs": json.dumps(knobs)}
    return NATIVE, fields, r'"finish_reason": "(stop|length)"[^\n]*}\n$'


def speech(model: str, knobs: dict, end: str, **fields: str) -> Kind:
    return SPEECH, {"model": model, "input": "hello", **fields, **knobs}, end


def kinds(model: str) -> dict[str, Kind]:
    """What the clients of a model ask for."""
    knobs = PACE if model == "every" else SHORT
    mix = {
        "native audio": native("audio", knobs),
        "speech mp3": speech(model, knobs, "", response_format="mp3"),
        "speech pcm": speech(model, knobs, "", response_format="pcm"),
        "speech sse": speech(model, knobs, r'"speech.audio.done"[^\n]*\n\n$', stream_format="sse"),
    }
    if model == "every":
        messages = [{"role": "user", "content": "hello"}]
        chat = {"model": model, "messages": messages, "stream": True, **PACE}
        image = {"model": model, "prompt": "a cat", "size": "256x256", "pause": 0.2}
        mix["native text"] = native("text", knobs)
        mix["chat"] = ("/v1/chat/completions", chat, r"data: \[DONE\]\n\n$")
        mix["image"] = ("/v1/images/generations", image, r'"b64_json":')
    return mix


def message_of(path: str, fields: dict) -> bytes:
    form = path == NATIVE
    body = (urlencode(fields) if form else json.dumps(fields)).encode()
    kind = "x-www-form-urlencoded" if form else "json"
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    head += f"Content-Type: application/{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def ask(port: int, message: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(message)
        return await reader.read()
    finally:
        writer.transport.abort()


def fault_of(answer: bytes, end: str) -> str | None:
    """What is wrong with a whole answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        return answer[:12].decode("latin-1") + answer[-200:].decode("latin-1")
    if b"transfer-encoding: chunked" in head.lower():
        if not body.endswith(b"\r\n0\r\n\r\n"):
            return f"cut off: ...{answer[-80:]!r}"
        body = body[:-7]
    if not re.search(end, body.decode("latin-1")):
        return f"not the right end: ...{answer[-200:]!r}"
    return None


async def crowd(port: int, model: str, count: int, seconds: float, seed: int) -> tuple:
    """`count` clients for some seconds: what became of their requests, and what went wrong."""
    end = time.monotonic() + seconds
    mix = list(kinds(model).items())
    became: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []

    async def one(index: int) -> None:
        chance = random.Random(f"{seed} {index}")
        await asyncio.sleep(chance.uniform(0, min(2.0, seconds / 4)))
        while time.monotonic() < end:
            name, (path, fields, tail) = mix[index % len(mix)]
            index += 1
            leaves = chance.random() < LEAVING
            try:
                limit = chance.uniform(0, 2) if leaves else LONGEST
                answer = await asyncio.wait_for(ask(port, message_of(path, fields)), limit)
                fault, outcome = fault_of(answer, tail), "done"
            except asyncio.TimeoutError:
                fault, outcome = None if leaves else "no end in sight", "left"
            except OSError as error:
                fault = repr(error)
            if fault:
                faults.append(f"{name}: {fault}")
                outcome = "failed"
            became[name, outcome] += 1

    await asyncio.gather(*(one(index) for index in range(count)))
    return became, faults


def clients(pipe, port: int, model: str, count: int, seed: int) -> None:
    """A process of clients; runs for as many seconds as it is told to."""
    while (seconds := pipe.recv()) is not None:
        pipe.send(asyncio.run(crowd(port, model, count, seconds, seed)))
