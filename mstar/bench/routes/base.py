"""What all protocols have in common."""

from __future__ import annotations

import base64
import json
import mimetypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mstar.bench.prompts import Attachment, Prompt
from mstar.bench.sse import SseEvent, SseParser
from mstar.bench.trace import Bad, Trace

__all__ = ["Ask", "DocumentReader", "Reader", "Request", "Route", "SseReader", "data_url"]

JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Ask:
    """What the user wants of every request; `extra` are parameters of the model.

    `sse` asks speech and images for server-sent events; chat always streams so.
    """

    model: str | None = None
    voice: str | None = None
    modalities: tuple[str, ...] = ()
    max_tokens: int | None = None
    ignore_eos: bool = False
    sse: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    attached: tuple[Attachment, ...] = ()


@dataclass(frozen=True)
class Request:
    """A POST, ready to be sent."""

    path: str
    headers: dict[str, str]
    body: bytes


class Reader(ABC):
    """Puts the pieces of one answer into its trace.

    `feed` and `finish` raise `Bad` for an answer that is an error or makes no sense. `over` turns
    true where an answer says that it is complete before its body ends.
    """

    over = False

    @abstractmethod
    def feed(self, at: float, piece: bytes) -> None:
        """A piece of the body, and when it came."""

    @abstractmethod
    def finish(self, at: float) -> None:
        """The body has ended."""


class Route(ABC):
    """A protocol: how a prompt is asked, and who reads the answer."""

    use: ClassVar[str] = "talk"
    """What prompts are for; see `built_in`."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask

    @abstractmethod
    def request(self, prompt: Prompt, seed: int | None) -> Request:
        """The request for a prompt."""

    @abstractmethod
    def reader(self, trace: Trace, content_type: str) -> Reader:
        """The reader of a reply with status 200."""

    def _json(self, path: str, body: dict[str, Any]) -> Request:
        given = {name: value for name, value in body.items() if value is not None}
        data = json.dumps({**given, **self.ask.extra}).encode()
        return Request(path, JSON, data)


class SseReader(Reader):
    """Calls `on_event` for every event that is a JSON object, `[DONE]` ends it.

    Args:
        on_event: takes the time, the name of the event and the object.
        on_end: called once at the end; raises `Bad` if something is missing.
    """

    def __init__(
        self,
        on_event: Callable[[float, str, dict[str, Any]], None],
        on_end: Callable[[bool], None],
    ) -> None:
        self._parser = SseParser()
        self._on_event, self._on_end = on_event, on_end

    def feed(self, at: float, piece: bytes) -> None:
        for event in self._parser.feed(piece):
            self._take(at, event)

    def finish(self, at: float) -> None:
        for event in self._parser.finish():
            self._take(at, event)
        self._on_end(self.over)

    def _take(self, at: float, event: SseEvent) -> None:
        if self.over or not event.data.strip():
            return
        if event.data.strip() == "[DONE]":
            self.over = True
            return
        said = parsed(event.data)
        if said.get("error") or event.name == "error":
            raise Bad("error in the stream", words_of(said.get("error") or said))
        self._on_event(at, event.name, said)


class DocumentReader(Reader):
    """Calls `on_document` with the JSON object that the body is."""

    def __init__(self, on_document: Callable[[float, dict[str, Any]], None]) -> None:
        self._parts: list[bytes] = []
        self._on_document = on_document

    def feed(self, at: float, piece: bytes) -> None:
        self._parts.append(piece)

    def finish(self, at: float) -> None:
        said = parsed(b"".join(self._parts))
        if said.get("error"):
            raise Bad("error in the answer", words_of(said["error"]))
        self._on_document(at, said)


def parsed(data: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Bad: it is something else.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Bad("no JSON object", f"got {data[:100]!r}")
    return value


def words_of(error: Any) -> str:
    """What an error object says."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or json.dumps(error)
    return str(error)[:500]


def number(value: Any) -> int | None:
    """A count that a server gave, if it is one."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if is_count else None


def data_url(attachment: Attachment) -> str:
    """The file inside a URL."""
    kind = mimetypes.guess_type(attachment.name)[0] or f"{attachment.kind}/*"
    return f"data:{kind};base64,{base64.b64encode(attachment.data).decode()}"
