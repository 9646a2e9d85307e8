from __future__ import annotations

import numpy as np
import pytest
from walks import Gate, settle

from mstar.engine.node import Node
from mstar.engine.request import Request
from mstar.engine.runtime import Runtime
from mstar.engine.traps import gather, sleep, spawn
from mstar.errors import RequestCancelled, RequestFailed, RequestTimeout
from mstar.types import AudioChunk, ImageChunk, TextChunk


class Sink:
    """Remembers what the caller would get."""

    def __init__(self):
        self.events, self.error, self.ended = [], None, 0

    def event(self, event):
        assert not self.ended, "an event after the end"
        self.events.append(event)

    def end(self, error, usage):
        self.error, self.ended = error, self.ended + 1

    @property
    def texts(self):
        return [event.text for event in self.events if isinstance(event, TextChunk)]


def begin(walk, outputs=("text",), **options):
    runtime, sink = Runtime(), Sink()
    request = Request("r1", None, {}, outputs, sink, **options)
    request.ends = []
    request.on_end = lambda request, was: request.ends.append((was, request.state))
    request.arm(runtime)
    request.begin(runtime, walk)
    return runtime, request, sink


def run(walk, **options):
    runtime, request, sink = begin(walk, **options)
    settle(runtime)
    assert sink.ended == len(request.ends) == 1
    assert request.is_over
    return request, sink


def double(name="node", **options):
    return Node(name, lambda batch: [2 * x for x in batch], **options)


def test_what_is_emitted_is_delivered_and_the_last_event_closes():
    async def walk(request):
        request.emit_text("a")
        request.emit_image(b"png", seed=1)
        request.emit_actions(np.zeros((2, 3)))
        request.emit_latents(np.ones(4))
        request.emit_text("b")

    request, sink = run(walk)
    assert [event.modality for event in sink.events] == [
        "text", "image", "action", "latent", "text", "text",
    ]  # fmt: skip
    assert sink.texts == ["a", "b", ""]
    assert sink.events[1] == ImageChunk(b"png", metadata={"seed": 1})
    assert sink.events[-1].finish_reason == "stop"
    assert sink.events[-1].usage is request.usage
    assert sink.error is None
    assert request.ends == [("running", "completed")]
    assert 0 <= request.usage.time_to_first_event <= request.usage.total_time


def test_the_walk_says_why_it_ended():
    async def walk(request):
        return "length"

    assert run(walk)[1].events[-1].finish_reason == "length"


def test_audio_is_counted_and_its_stream_is_closed_by_an_empty_chunk():
    async def walk(request):
        request.emit_audio(np.zeros(12000, np.int16), 24000)
        request.emit_audio(np.zeros(6000, np.int16), 24000)

    request, sink = run(walk, outputs=("audio",), sample_rate=24000)
    assert request.usage.audio_seconds == 0.75
    last = sink.events[-1]
    assert isinstance(last, AudioChunk)
    assert (len(last.pcm), last.sample_rate, last.finish_reason) == (0, 24000, "stop")


def test_calls_that_are_emitted_run_behind_the_walk_and_arrive_in_order():
    order = []
    slow = Node("slow", lambda batch: order.extend(batch) or batch, max_batch=1)
    quick = double()

    async def twice(x):
        return str(await quick(await quick(x)))

    async def walk(request):
        request.emit_text(slow("1"))
        request.emit_text("2")
        request.emit_text(twice(3))
        task = spawn(twice(4))
        request.emit_text(task)
        request.emit_text(slow("5"))
        order.append("walk")
        await task  # children end with their parent

    _, sink = run(walk)
    assert sink.texts == ["1", "2", "12", "16", "5", ""]
    assert order[0] == "walk"


def test_one_modality_does_not_wait_for_another():
    gate = Gate()

    async def late():
        await gate.wait()
        return "late"

    async def walk(request):
        request.emit_text(late())
        request.emit_image(b"png")

    runtime, _, sink = begin(walk)
    settle(runtime)
    assert [event.modality for event in sink.events] == ["image"]
    assert not sink.ended
    gate.open()
    settle(runtime)
    assert [event.modality for event in sink.events] == ["image", "text", "text"]
    assert sink.ended == 1


def test_an_error_in_the_walk_fails_the_request_and_withdraws_what_it_emitted():
    node, batches = Node("node", lambda batch: batches.append(batch) or batch), []

    async def walk(request):
        request.emit_text("first")
        request.emit_text(node("never"))
        raise KeyError("walk")

    request, sink = run(walk)
    assert isinstance(sink.error, RequestFailed)
    assert str(sink.error) == "KeyError: 'walk'"
    assert isinstance(sink.error.__cause__, KeyError)
    assert sink.texts == ["first"]
    assert batches == []
    assert request.ends == [("running", "failed")]


def test_an_error_in_something_emitted_ends_the_walk():
    closed = []

    def fail(batch):
        raise ValueError("codec")

    bad = Node("codec", fail)

    async def walk(request):
        try:
            request.emit_text(bad(1))
            await Gate().wait()
        finally:
            closed.append(True)

    _, sink = run(walk)
    assert str(sink.error) == "ValueError: codec"
    assert closed == [True]


def test_a_value_that_is_no_event_fails_its_request_and_not_the_runtime():
    node = Node("codec", lambda batch: [None for _ in batch])

    async def walk(request):
        request.emit_audio(node(1), 24000)
        await Gate().wait()

    _, sink = run(walk)
    assert isinstance(sink.error, RequestFailed)


def test_an_emit_that_cannot_begin_raises_in_the_walk_and_leaves_no_gap():
    node = double(key=lambda x: 1 // x)

    async def walk(request):
        with pytest.raises(ZeroDivisionError):
            request.emit_text(node(0))
        with pytest.raises(TypeError):
            request.emit_audio(None, 24000)
        request.emit_text("on")

    assert run(walk)[1].texts == ["on", ""]


def test_cancelling_runs_finally_blocks_of_walk_children_and_branches():
    gate, closed = Gate(), []

    async def park(name):
        try:
            await gate.wait()
        finally:
            closed.append(name)

    async def walk(request):
        try:
            request.emit_text("begun")
            request.emit_text(park("emitted"))
            spawn(park("child"))
            await gather(park("branch"), park("other branch"))
        finally:
            closed.append("walk")

    runtime, request, sink = begin(walk)
    settle(runtime)
    request.stop(RequestCancelled("cancelled"))
    request.stop(RequestCancelled("again"))
    assert sorted(closed) == ["branch", "child", "emitted", "other branch", "walk"]
    assert gate.waiters == []
    assert str(sink.error) == "cancelled"
    assert request.ends == [("running", "stopped")]
    settle(runtime)
    assert sink.ended == 1


def test_a_request_can_be_cancelled_before_it_began():
    sink = Sink()
    request = Request("r", None, {}, ("text",), sink)
    request.stop(RequestCancelled("early"))
    assert (request.state, sink.ended) == ("stopped", 1)


def test_the_deadline_ends_the_request():
    async def walk(request):
        await sleep(60)

    runtime, request, sink = begin(walk, timeout=0.01)
    request.on_end = lambda *_: runtime.stop()
    runtime.run()
    assert isinstance(sink.error, RequestTimeout)
    assert "request r1 was not done within 0.01 s" in str(sink.error)
    assert request.state == "stopped"


def test_a_request_that_ended_in_time_is_not_stopped_by_its_deadline():
    async def walk(request):
        request.emit_text("quick")

    runtime, request, sink = begin(walk, timeout=0.01)
    runtime.call_later(0.02, runtime.stop)
    runtime.run()
    assert (sink.error, request.state, sink.ended) == (None, "completed", 1)
