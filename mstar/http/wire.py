"""Events and results as the native route writes them."""

from __future__ import annotations

import binascii
import functools
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mstar.http.errors import Refused
from mstar.models.parameters import plain
from mstar.types import (
    ActionChunk,
    AudioChunk,
    Event,
    GenerateResult,
    ImageChunk,
    LatentChunk,
    ProgressChunk,
    TextChunk,
)

__all__ = ["document", "error_line", "lines", "size_of"]

_PCM = np.dtype("<i2")
_AUDIO = (
    b'{"modality": "audio", "data": "%b", "metadata": {"sample_rate": %d, "num_channels": 1}}\n'
)


def lines(events: Sequence[Event], request_id: str, names: Mapping[str, str]) -> bytes:
    """NDJSON: one object per event with the keys `modality`, `data` (base64) and `metadata`.

    Args:
        events: in order.
        request_id: goes to the metadata of the last event of a request.
        names: what this client calls things, see `Ask`.
    """
    return b"".join([_event_lines(event, request_id, names) for event in events])


def _event_lines(event: Event, request_id: str, names: Mapping[str, str]) -> bytes:
    if type(event) is AudioChunk and not event.metadata and event.finish_reason is None:
        pcm = np.ascontiguousarray(event.pcm, _PCM)  # most of what is sent: no detours
        return _AUDIO % (_base64(pcm), event.sample_rate)
    closing = _closing(event, request_id)
    return b"".join(
        [_line(name, data, {**told, **closing}) for name, data, told in _named(event, names)]
    )


def error_line(refused: Refused) -> bytes:
    """The last line of a stream that failed. Its status says whose fault it is, 400 or 500; what
    it is in the words of `mstar.errors`, where that is known, is told beside it."""
    metadata = {"status": 400 if refused.status < 500 else 500}
    told = {"error": refused.kind, "retry_after": refused.retry_after}
    metadata |= {name: value for name, value in told.items() if value is not None}
    return _line("error", refused.message.encode(), metadata)


def document(result: GenerateResult, names: Mapping[str, str]) -> bytes:
    """A whole result, grouped by modality; the last entry of each tells how it ended."""
    outputs: dict[str, list[dict[str, Any]]] = {}
    for event in _whole(result):
        for name, data, told in _named(event, names):
            entry = {"data": _base64(data).decode(), "metadata": told}
            outputs.setdefault(name, []).append(entry)
    closing = {
        "finish_reason": result.finish_reason,
        "usage": asdict(result.usage) if result.usage else None,
        "request_id": result.request_id,
    }
    for entries in outputs.values():
        entries[-1]["metadata"].update(closing)
    return _encoded({"request_id": result.request_id, "outputs": outputs}).encode()


def size_of(events: Sequence[Event]) -> int:
    """About how many bytes the events hold."""
    return sum(map(_size, events))


def _whole(result: GenerateResult) -> list[Event]:
    """The result as few events as can be: text, audio and actions are one each."""
    events: list[Event] = []
    if result.text:
        labelled = {"labels": result.labels, "scores": result.scores} if result.labels else {}
        events.append(TextChunk(result.text, metadata=labelled))
    events += [e for e in result.raw if isinstance(e, (ImageChunk, LatentChunk))]
    if result.audio is not None:
        events.append(AudioChunk(result.audio.pcm, result.audio.sample_rate))
    if result.actions is not None:
        metadata = next(e.metadata for e in result.raw if isinstance(e, ActionChunk))
        events.append(ActionChunk(result.actions, metadata=metadata))
    return events or [event for event in result.raw if event.finish_reason is not None]


def _named(event: Event, names: Mapping[str, str]) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Modality, payload and metadata, in the words of the client."""
    data, metadata = _payload(event)
    metadata = {**event.metadata, **metadata}
    name = names.get(event.modality, event.modality)
    if not isinstance(event, LatentChunk):
        yield name, data, metadata
        return
    yield names.get(metadata.get("name"), name), data, metadata
    if "scalar" in names and "best_index" in metadata:
        told = {"dtype": "int64", "shape": [], "name": "best_index"}
        yield names["scalar"], struct.pack("<q", metadata["best_index"]), told


def _payload(event: Event) -> tuple[bytes, dict[str, Any]]:
    if isinstance(event, TextChunk):
        return event.text.encode("utf-8", "replace"), {}
    if isinstance(event, ImageChunk):
        return event.data, {}
    if isinstance(event, AudioChunk):
        pcm = np.asarray(event.pcm, _PCM).tobytes()
        return pcm, {"sample_rate": event.sample_rate, "num_channels": 1}
    if isinstance(event, ProgressChunk):
        return event.preview, {"step": event.step, "steps": event.steps}
    array = event.actions if isinstance(event, ActionChunk) else event.latents
    array = np.ascontiguousarray(array, dtype="<f4")
    return array.tobytes(), {"dtype": "float32", "shape": list(array.shape)}


def _size(event: Event) -> int:
    if isinstance(event, AudioChunk):
        return 2 * len(event.pcm)
    if isinstance(event, TextChunk):
        return len(event.text)
    if isinstance(event, ImageChunk):
        return len(event.data)
    if isinstance(event, ProgressChunk):
        return len(event.preview)
    return 4 * (event.actions if isinstance(event, ActionChunk) else event.latents).size


def _closing(event: Event, request_id: str) -> dict[str, Any]:
    if event.finish_reason is None:
        return {}
    usage = asdict(event.usage) if event.usage else None
    return {"finish_reason": event.finish_reason, "usage": usage, "request_id": request_id}


def _line(modality: str, data: bytes, metadata: dict[str, Any]) -> bytes:
    """One line; base64 needs no escapes, so it is not sent through the JSON encoder."""
    told = _encoded(modality).encode(), binascii.b2a_base64(data, newline=False)
    return b'{"modality": %b, "data": "%b", "metadata": %b}\n' % (
        *told,
        _encoded(metadata).encode(),
    )


def _json(value: Any) -> Any:
    """What JSON has no word for: numpy numbers and arrays; anything else as text."""
    value = plain(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value if isinstance(value, (bool, int, float, str)) else str(value)


_base64 = functools.partial(binascii.b2a_base64, newline=False)
_encoded = json.JSONEncoder(default=_json).encode  # made once: `json.dumps` makes one per call
