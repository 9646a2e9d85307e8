"""Our clients against a server that speaks the native route and nothing more: no metadata of ours.

The stub says how the files reached it, so that the form that we send is read by another's parser.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Form, HTTPException, UploadFile
from starlette.responses import JSONResponse, Response, StreamingResponse

from mstar.client import InvalidRequest, RawChunk, RequestFailed
from tests.every_modality import picture
from tests.http.conftest import serving
from tests.http.test_mstar_clients import Both

PNG = picture(4, 4, 9)
PCM = np.arange(-3, 3, dtype="<i2")
NUMBERS = np.array([0.5, -1.5, 3.0], "<f4")
FILM = b"\0\0\0\x18ftypmp42" + bytes(16)
PAYLOADS: dict[str, list[tuple[bytes, dict[str, Any]]]] = {
    "text": [(b"gr", {}), ("üß".encode(), {}), (b" dich", {})],
    "image": [(PNG, {})],
    "audio": [(PCM.tobytes(), {"sample_rate": 24000, "num_channels": 1})] * 2,
    "action": [(NUMBERS.tobytes(), {})],
    "video": [(NUMBERS.tobytes(), {})],
}


def stub() -> FastAPI:
    """The smallest server of the native route."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "healthy"}

    @app.post("/generate")
    async def generate(
        text: str = Form(""),
        files: list[UploadFile] = (),
        input_modalities: str = Form(""),
        output_modalities: str = Form("text"),
        streaming: bool = Form(True),
        model_kwargs: str = Form("{}"),
        request_id: str = Form(""),
    ) -> Response:
        kwargs = json.loads(model_kwargs)
        if kwargs.get("refuse"):
            raise HTTPException(400, "Invalid model_kwargs")
        if kwargs.get("tell"):
            told = [[file.filename, len(await file.read())] for file in files]
            told = {"files": told, "order": input_modalities, "kwargs": kwargs, "text": text}
            items = [("text", json.dumps(told).encode(), {})]
        else:
            wanted = output_modalities.split(",")
            items = [(word, *payload) for word in wanted for payload in PAYLOADS[word]]
        if kwargs.get("fail"):
            items.append(("error", b"out of luck", {"status": 500}))
        if kwargs.get("film"):
            items = [("video", FILM, {})]
        if streaming:
            return StreamingResponse(_lines(items), media_type="application/x-ndjson")
        outputs: dict[str, list[dict[str, Any]]] = {}
        for modality, data, metadata in items:
            outputs.setdefault(modality, []).append(_entry(data, metadata))
        name = request_id or str(uuid.uuid4())
        return JSONResponse({"request_id": name, "outputs": outputs})

    return app


def _entry(data: bytes, metadata: dict[str, Any]) -> dict[str, Any]:
    return {"data": base64.b64encode(data).decode(), "metadata": metadata}


def _lines(items: list[tuple[str, bytes, dict[str, Any]]]) -> Iterator[str]:
    for modality, data, metadata in items:
        yield json.dumps({"modality": modality, **_entry(data, metadata)}) + "\n"


@pytest.fixture(scope="module")
def bare() -> Iterator[str]:
    with serving(None, stub()) as site:
        yield site.url


@pytest.fixture(params=["sync", "async"])
def ask(request, bare) -> Both:
    return Both(request.param, bare)


def test_a_result_has_all_that_was_sent(ask):
    result = ask("generate", text="x", output_modalities=tuple(PAYLOADS), request_id="mine")
    assert result.text == "grüß dich"
    assert result.images == [PNG]
    assert result.audio.pcm.tolist() == [*PCM, *PCM]
    assert result.actions.tolist() == NUMBERS.tolist()
    assert result.latents[0].tolist() == NUMBERS.tolist()
    assert result.request_id == "mine"
    assert result.finish_reason is result.usage is None


def test_a_stream_has_all_that_was_sent_and_ends_with_the_body(ask):
    events = ask("stream", text="x", output_modalities=("text", "audio", "image"))
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["TextChunk"] * 3 + ["AudioChunk"] * 2 + ["ImageChunk"]
    assert "".join(event.text for event in events[:3]) == "grüß dich"
    assert all(event.finish_reason is None for event in events)


def test_an_encoded_film_is_left_as_it_is(ask):
    (event,) = ask("stream", text="x", film=True)
    assert isinstance(event, RawChunk)
    assert (event.modality, event.data) == ("video", FILM)


def test_files_and_parameters_arrive(ask):
    files = {"images": [PNG, ("two.png", PNG)], "audio": ("a.wav", b"RIFF....WAVE")}
    order = ("image", "audio", "text", "image")
    result = ask("generate", text="q", input_modalities=order, tell=True, steps=3, **files)
    told = json.loads(result.text)
    assert told["order"] == "image,audio,text,image"
    assert [size for _, size in told["files"]] == [len(PNG), 12, len(PNG)]
    assert [name.rpartition(".")[2] for name, _ in told["files"]] == ["png", "wav", "png"]
    assert told["kwargs"] == {"tell": True, "steps": 3}


def test_errors_are_typed_before_and_in_a_stream(ask):
    with pytest.raises(InvalidRequest, match="Invalid model_kwargs"):
        ask("stream", text="x", refuse=True)
    with pytest.raises(RequestFailed, match="out of luck"):
        ask("stream", text="x", fail=True)
