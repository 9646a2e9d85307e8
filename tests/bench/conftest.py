"""The odd server, and our own, on free loopback ports."""

from __future__ import annotations

import pytest

pytest.importorskip("httpcore")
pytest.importorskip("fastapi")

from tests.bench.stub import Stub
from tests.http.conftest import serving, site, speaker  # noqa: F401

ALL = ("models", "chat/completions", "audio/speech", "images/generations", "images/edits")


@pytest.fixture(scope="package")
def stub_server():
    """A `Stub` and where it is; shared."""
    app = Stub(ALL)
    with serving(None, app) as place:
        yield app, place.url


@pytest.fixture
def stub(stub_server):
    """The shared stub with a clean memory; `.url` is where it is."""
    app, url = stub_server
    app.seen.clear()
    app.url = url
    return app


@pytest.fixture
def start():
    """Starts a stub of one's own: `start(Stub(...))` gives its URL."""
    import contextlib

    with contextlib.ExitStack() as stack:
        yield lambda app: stack.enter_context(serving(None, app)).url
