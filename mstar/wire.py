"""From the body of a reply on the native route to events. Needs numpy only."""

from __future__ import annotations

import base64
import binascii
import codecs
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mstar.errors import EngineOverloaded, RequestFailed, RequestTimeout
from mstar.transport import Deadline, error_of, shown
from mstar.types import (
    ActionChunk,
    AudioBuffer,
    AudioChunk,
    Event,
    GenerateResult,
    ImageChunk,
    LatentChunk,
    ProgressChunk,
    TextChunk,
    Usage,
    fold,
)

__all__ = ["PROMISE", "RawChunk", "Reply", "image_of", "sound_of"]

PROMISE = "x-mstar-version"
"""A reply with this header comes from a server whose streams always end with a line that carries
`finish_reason`; one that ends without was cut off."""

_VIDEO_FILES = ((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (0, b"\x1aE\xdf\xa3"), (8, b"AVI "))


@dataclass
class RawChunk(Event):
    """Bytes of a kind that mstar itself never makes: an encoded video, or another server's own."""

    data: bytes
    modality: str

    def save(self, path: str | Path) -> None:
        """Write the bytes as they are."""
        Path(path).write_bytes(self.data)


class Reply:
    """Turns the body of a 200 reply into events, piece by piece.

    Args:
        url: for messages of errors.
        stream: whether the body is NDJSON, one event a line, or one JSON document.
        request_id: what the caller gave.
    """

    def __init__(self, url: str, stream: bool, request_id: str | None = None) -> None:
        self.url, self.stream, self.request_id = url, stream, request_id
        self.done = False
        self._promised = False
        self._events: list[Event] = []
        self._parts: list[bytes] = []
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._half_sample = b""

    def begin(self, headers: Mapping[str, str]) -> None:
        """The header of the reply is there."""
        self._promised = self.stream and PROMISE in headers
        self.request_id = self.request_id or headers.get("x-request-id")

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that `piece` completes.

        Raises:
            MStarError: what a line with modality `error` says.
        """
        if not self.stream or b"\n" not in piece:
            self._parts.append(piece)
            return
        *lines, rest = b"".join([*self._parts, piece]).split(b"\n")
        self._parts = [rest]
        for line in lines:
            yield from self._line(line)

    def finish(self) -> Iterator[Event]:
        """The events that were still to come when the body ended.

        Raises:
            RequestFailed: the body is not complete.
        """
        body, self._parts = b"".join(self._parts), []
        if self.stream:
            yield from self._line(body)
            if self._promised and not self.done:
                raise RequestFailed(f"the stream of {self.url} ended before its last line")
        else:
            yield from self._document(body)
        yield from self._tail()

    def whole(self) -> GenerateResult:
        """All events so far, folded."""
        return fold(self._events, self.request_id)

    def late(self, deadline: Deadline, silence: float) -> RequestTimeout:
        """The error for a reply that did not come in time."""
        try:
            deadline.left()
            message = f"{self.url} was silent for {silence:g} s"
        except TimeoutError:
            message = f"{self.url} was not done within {deadline.seconds:g} s"
        return RequestTimeout(message, self.whole())

    def _line(self, line: bytes) -> Iterator[Event]:
        if not line.strip():
            return
        item = self._json(line)
        if not isinstance(item.get("modality"), str):
            raise self._strange(f"a line without modality: {shown(line)}")
        yield from self._item(item["modality"], item)

    def _document(self, body: bytes) -> Iterator[Event]:
        document = self._json(body)
        outputs = document.get("outputs")
        if not isinstance(outputs, dict):
            raise self._strange(f"a document without outputs: {shown(body)}")
        if isinstance(document.get("request_id"), str):
            self.request_id = document["request_id"]
        for modality, items in outputs.items():
            for item in items if isinstance(items, list) else [items]:
                yield from self._item(modality, item)

    def _item(self, modality: str, item: Any) -> Iterator[Event]:
        if not isinstance(item, dict):
            raise self._strange(f"{modality} that is no object: {item!r:.100}")
        metadata = item.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        try:
            data = base64.b64decode(item.get("data") or "", validate=True)
        except (binascii.Error, ValueError, TypeError) as error:
            raise self._strange(f"{modality} that is not base64: {error}") from None
        if modality == "error":
            status = metadata.get("status")
            known = isinstance(status, int) and 400 <= status < 600
            message = data.decode("utf-8", "replace")
            kind = metadata.get("error")
            kind = kind if isinstance(kind, str) else None
            error = error_of(status if known else 500, message, kind, self.whole())
            if isinstance(error, EngineOverloaded):
                error.retry_after = metadata.get("retry_after")
            raise error
        if isinstance(metadata.get("request_id"), str):
            self.request_id = metadata["request_id"]
        reason, usage = metadata.get("finish_reason"), metadata.get("usage")
        last = reason is not None
        if last and modality != "text":
            yield from self._tail()
        event = self._event(modality, data, metadata, last)
        if event is None:
            return
        event.metadata = metadata
        if last:
            self.done = True
            event.finish_reason = str(reason)
        event.usage = _usage(usage)
        self._events.append(event)
        yield event

    def _event(self, modality: str, data: bytes, metadata: dict, last: bool) -> Event | None:
        """What the payload holds; nothing where there is nothing to tell."""
        if modality == "text":
            text = self._text.decode(data, final=last)
            return TextChunk(text) if text or last else None
        if modality == "audio":
            return self._audio(data, metadata)
        if modality == "progress" and {"step", "steps"} <= metadata.keys():
            return ProgressChunk(metadata["step"], metadata["steps"], data)
        if not data and "shape" not in metadata:
            return Event() if last else None
        if modality == "image":
            return ImageChunk(data)
        if modality == "action":
            return ActionChunk(self._array(modality, data, metadata))
        if modality == "video" and _is_video_file(data, metadata):
            return RawChunk(data, modality)
        if modality in ("latent", "video", "tensor"):
            return LatentChunk(self._array(modality, data, metadata))
        return RawChunk(data, modality)

    def _audio(self, data: bytes, metadata: dict) -> AudioChunk:
        try:
            rate = int(metadata.get("sample_rate") or 24000)
            channels = int(metadata.get("num_channels") or 1)
        except (TypeError, ValueError):
            rate = channels = 0
        if rate < 1 or channels < 1:
            raise self._strange(f"audio with metadata {metadata!r:.200}")
        data = self._half_sample + data
        whole = len(data) - len(data) % (2 * channels)
        data, self._half_sample = data[:whole], data[whole:]
        pcm = np.frombuffer(data, "<i2").astype(np.int16)
        if channels > 1:
            pcm = np.rint(pcm.reshape(-1, channels).mean(axis=1)).astype(np.int16)
        return AudioChunk(pcm, rate)

    def _array(self, modality: str, data: bytes, metadata: dict) -> np.ndarray:
        """float32, in the shape that the metadata gives, or flat."""
        name, shape = metadata.get("dtype") or "float32", metadata.get("shape")
        try:
            if name == "bfloat16":
                wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
                array = wide.view(np.float32)
            else:
                array = np.frombuffer(data, np.dtype(name).newbyteorder("<")).astype(np.float32)
            return array if shape is None else array.reshape([int(size) for size in shape])
        except (TypeError, ValueError) as error:
            raise self._strange(
                f"{modality} of {len(data)} bytes, dtype {name}, shape {shape}: {error}"
            ) from None

    def _tail(self) -> Iterator[Event]:
        """What is left of a character that was never completed."""
        text = self._text.decode(b"", final=True)
        if text:
            self._events.append(TextChunk(text))
            yield self._events[-1]

    def _json(self, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self._strange(f"something other than a JSON object: {shown(data)}")
        return value

    def _strange(self, what: str) -> RequestFailed:
        return RequestFailed(f"{self.url} sent {what}")


def image_of(result: GenerateResult) -> bytes:
    """The first image of a result that should have one."""
    if not result.images:
        raise RequestFailed(f"the model made no image (finish_reason={result.finish_reason})")
    return result.images[0]


def sound_of(result: GenerateResult) -> AudioBuffer:
    """The sound of a result that should have some."""
    if result.audio is None:
        raise RequestFailed(f"the model made no sound (finish_reason={result.finish_reason})")
    return result.audio


def _usage(given: Any) -> Usage | None:
    """The fields that mstar knows, of those that the server gave."""
    if not isinstance(given, dict):
        return None
    names = {field.name for field in dataclasses.fields(Usage)}
    return Usage(**{name: value for name, value in given.items() if name in names})


def _is_video_file(data: bytes, metadata: dict) -> bool:
    if "shape" in metadata or "dtype" in metadata:
        return False
    told = str(metadata.get("content_type") or metadata.get("mime_type") or "")
    magic = any(data.startswith(word, offset) for offset, word in _VIDEO_FILES)
    return magic or told.startswith("video/")
