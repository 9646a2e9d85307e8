"""Health, metrics, ids, keys, and the app inside another app."""

from __future__ import annotations

import json
import threading
import time

import pytest
import requests
from fastapi import FastAPI
from fastapi.middleware.gzip import GZipMiddleware

from mstar import Engine
from mstar.http import create_app
from tests.every_modality import every  # noqa: F401
from tests.http.conftest import every_site, serving


def test_probes_of_a_live_engine(site):
    assert site.get("/health").json() == {"status": "healthy"}
    assert site.get("/ready").json() == {"status": "ready"}
    assert site.get("/version").json()["model"] == "tts-1"


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics"])
def test_probes_can_be_asked_for_their_headers_only(site, path):
    reply = requests.head(f"{site.url}{path}", timeout=5)
    assert (reply.status_code, reply.content) == (200, b"")


def test_a_dead_engine_is_not_healthy():
    with every_site() as site:
        results: list[requests.Response] = []
        hangs = {"text": "x", "model_kwargs": '{"hang": true}'}
        request = threading.Thread(target=lambda: results.append(site.post(data=hangs)))
        request.start()
        while not site.engine.model.open_walks:
            time.sleep(0.005)

        def explode() -> None:
            raise RuntimeError("the kernel broke")

        site.engine._service._runtime.post(explode)
        request.join()
        assert results[0].status_code == 500
        assert "the kernel broke" in results[0].json()["detail"]
        health = site.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "dead"
        assert site.get("/ready").status_code == 503
        assert site.post(data={"text": "x"}).status_code == 503
        assert "mstar_up 0" in site.get("/metrics").text


def test_a_draining_server_takes_no_work_and_says_so():
    with every_site() as site:
        site.app.state.front.draining = True
        assert site.get("/health").json()["status"] == "draining"
        reply = site.post(data={"text": "x"})
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        reply = site.post("/v1/audio/speech", json={"model": "every", "input": "x"})
        assert reply.json()["error"]["type"] == "server_error"


def test_metrics_count_what_went_by():
    with every_site() as site:
        site.post(data={"text": "x", "output_modalities": "text,audio"})
        site.post(data={"wrong": "x"})
        site.post("/v1/audio/speech", json={"model": "other", "input": "x"})
        page = site.get("/metrics").text
    for line in (
        'mstar_http_requests_total{method="POST",route="/generate",status="200"} 1.0',
        'mstar_http_requests_total{method="POST",route="/generate",status="400"} 1.0',
        'mstar_http_requests_total{method="POST",route="/v1/audio/speech",status="404"} 1.0',
        "mstar_time_to_first_event_seconds_count 1.0",
        "mstar_time_to_first_audio_seconds_count 1.0",
        "mstar_real_time_factor_count 1.0",
        "mstar_inter_token_seconds_count 1.0",
        'mstar_tokens_total{kind="generated"} 3.0',
        "mstar_requests_running 0.0",
        "mstar_requests_waiting 0.0",
        'mstar_batch_size_bucket{le="1.0",node="echo"}',
    ):
        assert line in page, line


def test_metrics_show_the_pages_of_the_kv_cache(speaker):
    assert 'mstar_kv_pages{node="lm",state="used"} 0.0' in speaker.get("/metrics").text


def test_request_ids_go_in_and_out(site, caplog):
    with caplog.at_level("INFO", "mstar.http"):
        reply = site.post(data={"text": "x"}, headers={"x-request-id": "from-outside"})
        assert reply.headers["x-request-id"] == "from-outside"
        while not caplog.records:
            time.sleep(0.01)
    (record,) = caplog.records
    line = json.loads(record.getMessage())
    assert line["request_id"] == "from-outside"
    assert line["status"] == 200
    assert line["finish_reason"] == "stop"
    named = site.post(data={"text": "x", "request_id": "in-the-form"})
    assert named.headers["x-request-id"] == "in-the-form"
    odd = site.post(data={"text": "x"}, headers={"x-request-id": "a\tb"})
    assert odd.headers["x-request-id"].startswith("req-")


def test_a_key_is_asked_for():
    with every_site(api_key="sesame") as site:
        assert site.get("/health").status_code == 200
        refused = site.post(data={"text": "x"})
        assert refused.status_code == 401
        assert "Authorization: Bearer" in refused.json()["detail"]
        wrong = site.get("/v1/models", headers={"authorization": "Bearer wrong"})
        assert wrong.status_code == 401
        assert wrong.json()["error"]["code"] == "invalid_api_key"
        right = site.get("/v1/models", headers={"authorization": "Bearer sesame"})
        assert right.status_code == 200
        other = site.get("/v1/models", headers={"authorization": "bEaReR sesame"})
        assert other.status_code == 200
        basic = site.get("/v1/models", headers={"authorization": "Basic sesame"})
        assert basic.status_code == 401
        assert site.get("/docs").status_code == 401
        assert site.get("/openapi.json").status_code == 401


def test_pages_of_other_origins_may_call_only_if_they_are_named():
    headers = {"origin": "https://a.example"}
    with every_site(cors_origins=["https://a.example"]) as site:
        allowed = site.get("/health", headers=headers).headers
        assert allowed["access-control-allow-origin"] == "https://a.example"
        exposed = allowed["access-control-expose-headers"]
        assert exposed == "x-request-id, retry-after, x-mstar-error"
    with every_site() as site:
        reply = site.get("/health", headers=headers)
        assert "access-control-allow-origin" not in reply.headers


def test_the_app_can_be_mounted_in_another(every):  # noqa: F811
    outer = FastAPI()
    with Engine(every) as engine:
        outer.mount("/ai", create_app(engine, api_key="k"))
        with serving(engine, outer) as site:
            key = {"authorization": "Bearer k"}
            assert site.get("/ai/health").status_code == 200
            assert site.post("/ai/generate", data={"text": "x"}, headers=key).status_code == 200
            missing = site.get("/ai/v1/models/none", headers=key)
            assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("within", [False, True])
def test_middleware_of_the_caller_sees_streams_whole(every, within):  # noqa: F811
    outer, headers = FastAPI(), {"origin": "https://a.example"}
    with Engine(every) as engine:
        app = create_app(engine, cors_origins=["https://a.example"])
        (app if within else outer).add_middleware(GZipMiddleware, minimum_size=1)
        outer.mount("/ai", app)
        with serving(engine, outer) as site:
            reply = site.post("/ai/generate", data={"text": "x"}, headers=headers)
    assert reply.headers["content-encoding"] == "gzip"
    assert reply.headers["access-control-allow-origin"] == "https://a.example"
    assert reply.headers["x-request-id"].startswith("req-")
    *lines, last = map(json.loads, reply.text.splitlines())
    assert len(lines) == 3
    assert last["metadata"]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", ["/health", "/generate", "/v1/audio/speech", "/v1/models"])
def test_the_schema_knows_the_routes(site, path):
    assert path in site.get("/openapi.json").json()["paths"]


def test_our_own_client_gets_typed_errors_and_results(site):
    client_module = pytest.importorskip("mstar.client")
    if not hasattr(client_module, "MStarClient"):
        pytest.skip("no client yet")
    client = client_module.MStarClient(site.url)
    assert client.generate(text="x").text == "x0 x1 x2 "
    assert requests.get(f"{site.url}/health", timeout=5).ok
