"""Requests made from our own schema; `python -m tests.http.fuzz_openapi` sends more of them."""

from __future__ import annotations

import logging

import pytest

from tests.http.conftest import every_site

pytest.importorskip("schemathesis")

from tests.http.fuzz_openapi import fuzz

OPERATIONS = ("/generate", "/v1/audio/speech", "/v1/chat/completions", "/v1/images/generations")


def test_no_request_makes_the_server_fail(monkeypatch):
    monkeypatch.setattr(logging.getLogger("python_multipart"), "disabled", True)
    with every_site(served_model_name=["org/name"], max_body_mb=1, request_timeout=10) as site:
        report = fuzz(site.url, cases=300, seed=7)
        assert site.get("/health").status_code == 200
        assert site.engine.model.open_walks == 0
    assert not report.failures, "\n".join(report.failures)
    assert report.cases >= 300
    for path in OPERATIONS:
        counts = report.statuses[f"POST {path}"]
        assert counts[200] > 0, f"{path}: no case was good: {counts}"
        assert counts[400] > 0, f"{path}: no case was bad: {counts}"


def test_a_field_of_a_form_may_come_once_only(site):
    form = [("text", (None, "hi")), ("request_id", (None, "a")), ("request_id", (None, "b"))]
    reply = site.post(files=form)
    assert reply.status_code == 400  # and not 409, as for a live request
    assert reply.json() == {"detail": "request_id='twice': must be given once"}
