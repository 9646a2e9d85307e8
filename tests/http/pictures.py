"""What the tests of the images routes share."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from tests.http.conftest import Site


def strict(site: Site) -> Any:
    """openai-python, checking every reply against its own types."""
    openai = pytest.importorskip("openai")
    return openai.OpenAI(
        base_url=f"{site.url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    )


def spied(site: Site, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every request of the engine from here on."""
    seen, submit = [], site.engine.submit

    def spy(**arguments: Any) -> Any:
        seen.append(arguments)
        return submit(**arguments)

    monkeypatch.setattr(site.engine, "submit", spy)
    return seen


def opened(b64: str) -> Image.Image:
    """The image in a reply."""
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def mask_of(width: int, height: int) -> bytes:
    """A mask that lets all be edited."""
    out = io.BytesIO()
    Image.new("RGBA", (width, height), (0, 0, 0, 0)).save(out, "PNG")
    return out.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    """A file as a URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
