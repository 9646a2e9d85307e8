"""A real uvicorn on a free loopback port, over the test model or the tiny Orpheus."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import requests

from mstar import Engine
from mstar.models import registry

pytest.importorskip("fastapi")
import uvicorn

from mstar.http import create_app
from mstar.http.server import bind


@dataclass
class Site:
    """A server: where it is, and what is behind it."""

    url: str
    engine: Any
    app: Any

    def post(self, path: str = "/generate", **kwargs: Any) -> requests.Response:
        return requests.post(f"{self.url}{path}", timeout=30, **kwargs)

    def get(self, path: str, **kwargs: Any) -> requests.Response:
        return requests.get(f"{self.url}{path}", timeout=30, **kwargs)


@contextlib.contextmanager
def serving(engine: Any, app: Any) -> Iterator[Site]:
    """Serve `app` on a thread of its own."""
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    with contextlib.closing(bind("127.0.0.1", 0)) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield Site(f"http://127.0.0.1:{port}", engine, app)
        finally:
            server.should_exit = True
            thread.join(10)


@contextlib.contextmanager
def every_site(engine_options: dict[str, Any] | None = None, **options: Any) -> Iterator[Site]:
    """The model that emits every modality, served."""
    before = registry._BUILTIN.get("every")
    registry._BUILTIN["every"] = "tests.every_modality:CARD"
    try:
        with (
            Engine("every", **engine_options or {}) as engine,
            serving(engine, create_app(engine, **options)) as site,
        ):
            yield site
    finally:
        registry._BUILTIN.pop("every")
        if before is not None:
            registry._BUILTIN["every"] = before


@pytest.fixture(scope="package")
def site() -> Iterator[Site]:
    """The test model; shared, so tests leave it as they found it."""
    with every_site(served_model_name=["tts-1", "org/name"], max_body_mb=1) as site:
        yield site


@pytest.fixture(scope="package")
def speaker() -> Iterator[Site]:
    """The tiny Orpheus, shared."""
    with (
        Engine("orpheus-tiny") as engine,
        serving(engine, create_app(engine, served_model_name=["tts-1"])) as site,
    ):
        yield site


@pytest.fixture(scope="package")
def libero(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The tiny policy as trained on LIBERO, with the noise of the goldens; shared."""
    from tests.http.policies import golden_policy

    with golden_policy(tmp_path_factory.mktemp("libero"), "libero", max_body_mb=1) as site:
        yield site


@pytest.fixture
def slow(libero: Site) -> Iterator[Site]:
    """The same, for a time so slow that nobody would wait for it."""
    model, config = libero.engine.model, libero.engine.model.config
    model.config = replace(config, num_inference_steps=1000)
    yield libero
    model.config = config
    end = time.monotonic() + 10
    while libero.engine.stats()["requests"]["running"]:
        assert time.monotonic() < end
