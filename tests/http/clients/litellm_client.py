"""litellm against a server of the test model; run by litellm's own interpreter.

    python litellm_client.py http://127.0.0.1:8000/v1

Each check prints its name; the first that fails ends the program with its error.
"""

from __future__ import annotations

import asyncio
import base64
import struct
import sys
from collections.abc import Callable
from typing import Any

import litellm

MODEL = "openai/every"
MESSAGES = [{"role": "user", "content": "hello"}]
SAID = "0 1 2 "
CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {}


def check(function: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """Keep a check under its name."""
    CHECKS[function.__name__] = function
    return function


@check
def completion(server: dict[str, Any]) -> None:
    """Text, why it ended, and the usage."""
    reply = litellm.completion(MODEL, MESSAGES, temperature=0.5, seed=1, **server)
    assert reply.choices[0].message.content == SAID
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == 3
    cut = litellm.completion(MODEL, MESSAGES, max_tokens=2, **server)
    assert cut.choices[0].finish_reason == "length"


@check
def streaming(server: dict[str, Any]) -> None:
    """Pieces, and the usage at the end."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(MODEL, MESSAGES, **options, **server))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == SAID
    assert chunks[-1].usage.completion_tokens == 3


@check
def many_at_once(server: dict[str, Any]) -> None:
    """The asynchronous calls."""

    async def main() -> list[str]:
        calls = [litellm.acompletion(MODEL, MESSAGES, count=n, **server) for n in range(1, 9)]
        return [reply.choices[0].message.content for reply in await asyncio.gather(*calls)]

    assert asyncio.run(main()) == ["".join(f"{i} " for i in range(n)) for n in range(1, 9)]


@check
def speech(server: dict[str, Any]) -> None:
    """A file of sound."""
    options = {"voice": "Ethan", "response_format": "wav"}
    reply = litellm.speech(model=MODEL, input="hello", **options, **server)
    assert reply.content[:4] == b"RIFF"


@check
def image_generation(server: dict[str, Any]) -> None:
    """Pictures of the asked size."""
    reply = litellm.image_generation("a cat", model=MODEL, size="64x32", n=2, **server)
    assert len(reply.data) == 2
    for image in reply.data:
        png = base64.b64decode(image.b64_json)
        assert struct.unpack(">II", png[16:24]) == (64, 32)


@check
def errors(server: dict[str, Any]) -> None:
    """Its own classes, with our words."""
    for fields, kind, words in (
        ({"model": "openai/none"}, litellm.NotFoundError, "not served here"),
        ({"model": MODEL, "temperature": 3}, litellm.BadRequestError, "temperature"),
        ({"model": MODEL, "late_poison": True}, litellm.InternalServerError, "poison"),
    ):
        said = ""
        try:
            litellm.completion(**fields, messages=MESSAGES, num_retries=0, **server)
        except kind as error:
            said = str(error)
        assert words in said, f"{fields}: {said!r}"


if __name__ == "__main__":
    place = {"api_base": sys.argv[1], "api_key": "none", "timeout": 20}
    for name, run in CHECKS.items():
        run(place)
        print(name)
