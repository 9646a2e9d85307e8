"""Whole runs against a server with odd but legal habits."""

import json
from itertools import accumulate

import pytest

from mstar.bench.load import Load
from mstar.bench.prompts import Attachment, Prompt
from mstar.bench.report import raw, summary, table
from mstar.bench.routes import Ask
from mstar.bench.run import Plan, run
from mstar.errors import EngineClosed, InvalidRequest, MStarError, RequestFailed
from tests.bench.stub import USAGE, Stub


def bench(stub, *prompts, requests=1, concurrency=1, **more):
    load = more.pop("load", None) or Load(concurrency, requests=requests)
    more.setdefault("route", "chat")
    return run(Plan(stub.url, load, prompts=[Prompt(text) for text in prompts], **more))


def one(stub, prompt, **more):
    """The only trace of a run of one request."""
    (trace,) = bench(stub, prompt, **more).traces
    return trace


# what a chat may look like


@pytest.mark.parametrize(
    ("prompt", "pieces", "tokens"),
    [
        ("plain", 4, None),
        ("usage", 4, USAGE["completion_tokens"]),
        ("odd", 5, 5),
        ("no done", 4, None),
        ("whole", 1, USAGE["completion_tokens"]),
    ],
)
def test_legal_answers(stub, prompt, pieces, tokens):
    trace = one(stub, prompt)
    assert (trace.outcome, trace.message) == ("done", None)
    assert (len(trace.text), trace.tokens) == (pieces, tokens)
    assert trace.finish_reason == "stop"


def test_what_is_asked(stub):
    ask = Ask(
        modalities=("text", "audio"),
        voice="Ethan",
        max_tokens=9,
        ignore_eos=True,
        extra={"top_k": 5},
        attached=(Attachment("a.png", b"png", "image"), Attachment("b.wav", b"wav", "audio")),
    )
    bench(stub, "plain", ask=ask, seed=40, requests=2, api_key="secret")
    path, headers, body = stub.seen[-1]
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer secret"
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,cG5n"}}
    sound = {"type": "input_audio", "input_audio": {"data": "d2F2", "format": "wav"}}
    assert json.loads(body) == {
        "model": "stub-1",
        "messages": [
            {"role": "user", "content": [image, sound, {"type": "text", "text": "plain"}]}
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 9,
        "ignore_eos": True,
        "seed": 41,
        "modalities": ["text", "audio"],
        "audio": {"format": "pcm16", "voice": "Ethan"},
        "top_k": 5,
    }


def test_messages_go_as_they_are(stub):
    messages = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "plain"})
    plan = Plan(stub.url, Load(1, requests=1), "chat", prompts=[Prompt("", messages)])
    assert run(plan).traces[0].outcome == "done"
    assert json.loads(stub.seen[-1][2])["messages"] == list(messages)


def test_the_times_are_those_of_the_server(stub):
    found = summary(bench(stub, "paced"))["latency"]
    assert 0.09 < found["itl"]["p50"] < 0.15
    assert found["tpot"]["p50"] == pytest.approx(found["itl"]["mean"])
    assert found["ttft"]["p50"] < 0.1


def test_after_done_nobody_waits(stub):
    trace = one(stub, "lingers")
    assert trace.outcome == "done"
    assert trace.end - trace.sent < 0.5


def test_streamed_sound_in_a_chat(stub):
    trace = one(stub, "speaks")
    assert len(trace.text) == 2
    assert [seconds for _, seconds in trace.audio] == [0.5, 0.5]
    latency = summary(bench(stub, "speaks"))["underruns"]
    assert (latency["count"], latency["requests"]) == (1, 1)
    assert latency["seconds"] == pytest.approx(0.3, abs=0.1)


# failures


@pytest.mark.parametrize(
    ("prompt", "reason", "message"),
    [
        ("500", "HTTP 500", "no luck 500"),
        ("429", "HTTP 429", "no luck 429"),
        ("stalls", "timeout", "not done within 0.3 s"),
        ("cut", "broke off", "incomplete"),
        ("error", "error in the stream", "the GPU fell over"),
        ("nonsense", "no JSON object", "{oops"),
        ("empty", "empty answer", "finish_reason=stop"),
    ],
)
def test_failures_are_told_apart(stub, prompt, reason, message):
    trace = one(stub, prompt, timeout=0.3)
    assert (trace.outcome, trace.reason) == ("failed", reason)
    assert message in trace.message


def test_the_report_begins_with_failures_and_counts_only_what_is_done(stub):
    done = bench(stub, "usage", "500", "usage", "429", requests=8, concurrency=2)
    found = summary(done, {"ttft": 5.0, "e2e": 5.0})
    assert found["requests"] == {"sent": 8, "failed": 4, "left": 0, "done": 4}
    assert {(f["reason"], f["count"]) for f in found["failures"]} == {
        ("HTTP 500", 2),
        ("HTTP 429", 2),
    }
    assert found["tokens"] == {"prompt": 28, "generated": 48, "source": "usage"}
    assert found["throughput"]["tokens_per_s"] == pytest.approx(48 / found["seconds"])
    assert found["latency"]["e2e"]["count"] == 4
    assert found["latency"]["itl"]["count"] == 12
    assert found["goodput"]["requests"] == 4
    assert found["goodput"]["share"] == 0.5
    lines = table(found).splitlines()
    assert "8 requests, 2 at a time" in lines[0]
    assert lines[1] == "failed 4, left 0, done 4"
    assert lines[2] == "  2 x HTTP 500: no luck 500"
    assert "tokens/s" in table(found)
    assert "(50.0 %) kept ttft <= 5, e2e <= 5" in table(found)
    json.dumps([found, *map(raw, done.traces)], allow_nan=False)


def test_without_usage_pieces_are_counted_and_the_report_says_so(stub):
    found = summary(bench(stub, "plain"))
    assert found["tokens"] == {"prompt": 0, "generated": 4, "source": "chunks"}
    assert "chunks/s" in table(found)
    assert any("counts no tokens" in warning for warning in found["warnings"])
    assert summary(bench(stub, "plain", "usage", requests=2))["tokens"]["source"] == "mixed"


def test_a_report_of_nothing(stub):
    found = summary(bench(stub, "500"), {"ttft": 1.0})
    assert found["latency"]["ttft"] is None
    assert found["goodput"]["share"] == 0.0
    assert "failed 1, left 0, done 0" in table(found)


def test_clients_that_leave_are_counted_apart(stub):
    found = summary(bench(stub, "paced", requests=20, concurrency=20, disconnect=1.0, warmup=2))
    assert found["requests"]["failed"] == 0
    assert found["requests"]["left"] >= 10
    assert found["requests"]["left"] + found["requests"]["done"] == 20


def test_a_server_that_is_gone():
    plan = Plan("http://127.0.0.1:9", Load(1, requests=2))
    with pytest.raises(EngineClosed, match=r"cannot reach .*: connection refused"):
        run(plan)
    named = Plan("http://127.0.0.1:9", Load(1, requests=2), "chat", Ask(model="x"))
    assert {trace.reason for trace in run(named).traces} == {"no connection"}


def test_a_warm_up_that_fails_throughout_ends_the_run(stub):
    with pytest.raises(RequestFailed, match="all 2 warm-up requests failed: HTTP 500: no luck"):
        bench(stub, "500", warmup=2)


# load


def test_the_load_reaches_the_server(stub):
    done = bench(stub, "paced", requests=12, concurrency=4, warmup=4)
    ends = [(trace.sent, 1) for trace in done.traces] + [(trace.end, -1) for trace in done.traces]
    assert max(accumulate(step for _, step in sorted(ends))) == 4
    assert len(done.warmup) == 4
    assert [trace.index for trace in done.traces] == list(range(12))
    assert all(trace.connect is None for trace in done.traces)  # the warm-up made them


def test_arrivals_at_a_rate(stub):
    done = bench(stub, "plain", load=Load(None, rate=200.0, requests=20, seed=3))
    assert summary(done)["requests"]["done"] == 20
    assert all(0 <= trace.sent - trace.begun < 0.2 for trace in done.traces)


# other routes


def test_speech_as_raw_pcm(stub):
    trace = one(stub, "hello", route="speech", ask=Ask(voice="tara"))
    body = json.loads(stub.seen[-1][2])
    assert (body["input"], body["voice"], body["response_format"]) == ("hello", "tara", "pcm")
    assert sum(seconds for _, seconds in trace.audio) == pytest.approx(1.0)  # it said 48 kHz
    found = summary(bench(stub, "late", route="speech"))
    assert found["underruns"]["count"] == 1
    assert found["underruns"]["seconds"] == pytest.approx(0.3, abs=0.1)
    assert found["audio_seconds"] == pytest.approx(0.4)


def test_speech_as_events(stub):
    trace = one(stub, "hello", route="speech", ask=Ask(sse=True))
    assert sum(seconds for _, seconds in trace.audio) == pytest.approx(1.0)
    assert (trace.prompt_tokens, trace.tokens) == (3, 9)


def test_compressed_speech_is_a_warning(stub):
    found = summary(bench(stub, "mp3", route="speech"))
    assert found["latency"]["first_audio"]["count"] == 1
    assert found["latency"]["rtf"] is None
    assert any("compressed" in warning for warning in found["warnings"])


def test_images(stub):
    found = summary(bench(stub, route="images", ask=Ask(extra={"size": "64x64"})))
    assert json.loads(stub.seen[-1][2])["size"] == "64x64"
    assert (found["images"], found["latency"]["first_image"]["count"]) == (2, 1)
    assert summary(bench(stub, route="images", ask=Ask(sse=True)))["images"] == 1


def test_edits_where_a_picture_is_attached(stub):
    picture = Attachment("a.png", b"png bytes", "image")
    ask = Ask(attached=(picture,), extra={"n": 1, "quality": "low"})
    trace = one(stub, "make it blue", route="images", ask=ask)
    path, headers, body = stub.seen[-1]
    assert (path, len(trace.images)) == ("/v1/images/edits", 1)
    assert headers["content-type"].startswith("multipart/form-data")
    for part in (b'name="image"; filename="a.png"', b"png bytes", b"make it blue", b"low"):
        assert part in body


# asking the server


@pytest.mark.parametrize(
    ("paths", "route"),
    [
        (("models", "chat/completions", "audio/speech"), "chat"),
        (("models", "audio/speech", "images/generations"), "speech"),
        (("models", "images/generations"), "images"),
    ],
)
def test_auto_takes_the_first_route_that_there_is(start, paths, route):
    stub = Stub(paths)
    prompt = "plain"
    plan = Plan(start(stub) + "/v1/", Load(1, requests=1), prompts=[Prompt(prompt)])
    done = run(plan)
    assert (done.route, done.model, done.traces[0].outcome) == (route, "stub-1", "done")


def test_auto_falls_back_to_the_native_route(start):
    done = run(Plan(start(Stub()), Load(1, requests=1)))
    assert (done.route, done.traces[0].reason) == ("generate", "HTTP 404")


def test_a_server_that_names_no_model(start):
    url = start(Stub(("chat/completions",)))
    with pytest.raises(InvalidRequest, match="names none; say which"):
        run(Plan(url, Load(1, requests=1), "chat", prompts=[Prompt("plain")]))
    plan = Plan(url, Load(1, requests=1), "chat", Ask(model="m"), prompts=[Prompt("plain")])
    assert run(plan).traces[0].outcome == "done"


def test_a_wrong_key(start):
    url = start(Stub(("models", "chat/completions"), key="right"))
    with pytest.raises(MStarError, match="wrong key"):
        run(Plan(url, Load(1, requests=1), api_key="wrong"))
    done = run(Plan(url, Load(1, requests=1), prompts=[Prompt("plain")], api_key="right"))
    assert done.traces[0].outcome == "done"
