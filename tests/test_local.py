"""The Engine as its callers see it, with a model that emits every modality."""

import asyncio
import gc
import multiprocessing
import threading
import weakref

import numpy as np
import pytest

from mstar import (
    AudioChunk,
    Engine,
    EngineClosed,
    EngineOverloaded,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    RequestCancelled,
    RequestFailed,
    RequestTimeout,
    TextChunk,
)
from tests.every_modality import PNG, every  # noqa: F401
from tests.waiting import until


@pytest.fixture
def engine(every):  # noqa: F811
    with Engine(every) as engine:
        model = engine.model
        yield engine
    assert model.open_walks == 0


def test_all_modalities_come_back_in_one_result(engine):
    result = engine.generate(
        text="a", output_modalities=("text", "audio", "image", "action", "latent"), count=2
    )
    assert result.text == "a0 a1 "
    assert result.audio.pcm.tolist() == [0] * 240 + [1] * 240
    assert result.images == [PNG + b"\0", PNG + b"\1"]
    assert result.actions.shape == (4, 7)
    assert [latent.shape for latent in result.latents] == [(1, 3, 4)] * 2
    assert result.finish_reason == "stop"
    assert result.usage.audio_seconds == pytest.approx(0.02)
    assert 0 < result.usage.time_to_first_event <= result.usage.total_time


def test_the_default_output_is_the_models_first(engine):
    assert engine.generate(text="a").text == "a0 a1 a2 "


def test_a_stream_ends_with_an_empty_event_that_says_how_it_went(engine):
    *events, last = engine.generate(text="a", stream=True)
    assert [event.text for event in events] == ["a0 ", "a1 ", "a2 "]
    assert isinstance(last, TextChunk)
    assert (last.text, last.finish_reason, last.usage.generated_tokens) == ("", "stop", 3)
    *_, last = engine.stream(text="a", output_modalities=["audio"])
    assert isinstance(last, AudioChunk)
    assert len(last.pcm) == 0


def test_output_is_in_order_though_the_awaitables_are_not(engine):
    result = engine.generate(text="x", count=200)
    assert result.text == "".join(f"x{i} " for i in range(200))


def test_the_convenience_methods_say_what_they_mean(engine):
    assert engine.chat("a").text == "a0 a1 a2 "
    assert engine.generate_image("a", count=1) == PNG + b"\0"
    assert len(engine.tts("a", count=1)) == 240
    assert engine.act(text="a", count=1).shape == (2, 7)
    assert engine.health() == {"status": "healthy"}


def test_messages_take_the_place_of_text(engine):
    message = [{"role": "user", "content": "hi"}]
    assert engine.submit(messages=message).result(5).text == "0 1 2 "
    with pytest.raises(InvalidRequest, match="not both"):
        engine.submit(messages=message, text="a")


def test_closing_a_stream_cancels_the_request(engine):
    events = engine.generate(text="a", stream=True, count=10_000, pause=0.001)
    next(events)
    events.close()
    until(lambda: engine.stats()["requests"]["stopped"] == 1)
    assert engine.model.open_walks == 0


def test_cancel_keeps_what_was_made(engine):
    handle = engine.submit(text="a", count=10_000, pause=0.001)
    next(iter(handle))
    handle.cancel()
    with pytest.raises(RequestCancelled) as stopped:
        handle.result(5)
    assert stopped.value.partial.text.startswith("a0 ")
    assert stopped.value.partial.finish_reason == "cancelled"
    assert stopped.value.partial.usage.generated_tokens >= 1
    handle.cancel()  # again: nothing happens


def test_a_request_out_of_time_is_ended(engine):
    with pytest.raises(RequestTimeout, match=r"0\.05 s"):
        engine.generate(text="a", hang=True, timeout=0.05)
    assert isinstance(RequestTimeout("x"), TimeoutError)
    assert engine.model.open_walks == 0


def test_a_deadline_counts_while_the_request_waits(every):  # noqa: F811
    with Engine(every, max_running=1) as engine:
        first = engine.submit(text="a", hang=True)
        with pytest.raises(RequestTimeout):
            engine.submit(text="b", timeout=0.05).result(5)
        first.cancel()


def test_waiting_for_a_result_can_time_out_without_ending_the_request(engine):
    handle = engine.submit(text="a", hang=True)
    with pytest.raises(TimeoutError, match="still running"):
        handle.result(timeout=0.02)
    assert not handle.done
    handle.cancel()


def test_only_the_guilty_request_fails(engine):
    handles = [engine.submit(text=text) for text in ("a", "poison", "b")]
    assert handles[0].result(5).text == "a0 a1 a2 "
    assert handles[2].result(5).text == "b0 b1 b2 "
    with pytest.raises(RequestFailed, match="ZeroDivisionError: poison") as failed:
        handles[1].result(5)
    assert isinstance(failed.value.__cause__, ZeroDivisionError)


def test_a_failure_behind_the_walk_ends_it(engine):
    with pytest.raises(RequestFailed, match="poison"):
        engine.generate(text="a", late_poison=True)
    assert engine.model.open_walks == 0


def test_a_node_that_exits_fails_its_request_and_not_the_engine(engine):
    with pytest.raises(RequestFailed, match="SystemExit"):
        engine.generate(text="kill")
    assert engine.generate(text="a").text


def test_a_full_queue_is_refused_and_recovers(every):  # noqa: F811
    with Engine(every, max_running=2, max_queue=1) as engine:
        handles = [engine.submit(text="a", hang=True) for _ in range(3)]
        with pytest.raises(EngineOverloaded, match=r"2 \+ 1"):
            engine.submit(text="a")
        until(lambda: engine.stats()["requests"]["running"] == 2)
        assert engine.stats()["queue_depth"] == 1
        assert engine.stats()["requests"]["rejected"] == 1
        for handle in handles:
            handle.cancel()
        until(lambda: engine.stats()["requests"]["stopped"] == 3)
        assert engine.generate(text="a").text


def test_a_live_request_id_cannot_be_used_twice(engine):
    handle = engine.submit(text="a", hang=True, request_id="mine")
    with pytest.raises(InvalidRequest, match="live request"):
        engine.submit(text="a", request_id="mine")
    handle.cancel()
    until(lambda: handle.done)
    assert engine.generate(text="a", request_id="mine").request_id == "mine"


def test_a_batch_is_all_or_nothing(engine):
    texts = [result.text for result in engine.generate_batch([{"text": "a"}, {"text": "b"}])]
    assert texts == ["a0 a1 a2 ", "b0 b1 b2 "]
    with pytest.raises(InvalidRequest):
        engine.generate_batch([{"text": "a", "hang": True}, {"text": "b", "cont": 1}])
    until(lambda: engine.stats()["requests"]["running"] == 0)


def test_requests_of_an_event_loop_run_together(engine):
    async def main():
        results = await asyncio.gather(*(engine.agenerate(text=f"{i}-") for i in range(20)))
        streamed = [event.text async for event in engine.astream(text="s")]
        return [result.text for result in results], streamed

    texts, streamed = asyncio.run(main())
    assert texts == [f"{i}-0 {i}-1 {i}-2 " for i in range(20)]
    assert streamed == ["s0 ", "s1 ", "s2 ", ""]
    assert max(engine.stats()["nodes"]["echo"]["batch_sizes"]) > 1


def test_cancelling_the_awaiting_task_cancels_the_request(engine):
    async def main():
        task = asyncio.create_task(engine.agenerate(text="a", hang=True))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    until(lambda: engine.stats()["requests"]["stopped"] == 1)


def test_leaving_an_async_stream_cancels_the_request(engine):
    async def main():
        stream = engine.astream(text="a", count=10_000, pause=0.001)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(main())
    until(lambda: engine.stats()["requests"]["stopped"] == 1)


def test_errors_reach_an_event_loop(engine):
    with pytest.raises(RequestFailed, match="poison"):
        asyncio.run(engine.agenerate(text="poison"))
    with pytest.raises(InvalidRequest):
        asyncio.run(engine.agenerate(text="a", bogus=1))


def test_threads_share_the_engine(engine):
    texts: list[str] = []

    def work(name):
        texts.append(engine.generate(text=name).text)

    threads = [threading.Thread(target=work, args=(f"t{i}-",)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == sorted(f"t{i}-0 t{i}-1 t{i}-2 " for i in range(16))


def test_close_cancels_what_is_live_and_leaves_no_thread(every):  # noqa: F811
    before = threading.active_count()
    engine = Engine(every)
    model = engine.model
    handles = [engine.submit(text="a", hang=True, request_id=f"r{i}") for i in range(3)]
    engine.close()
    engine.close()
    for index, handle in enumerate(handles):
        with pytest.raises(RequestCancelled, match="closed") as stopped:
            handle.result(1)
        assert stopped.value.partial.request_id == f"r{index}"
    for call in (engine.generate, engine.health, engine.stats, engine.warmup, engine.policy):
        with pytest.raises(EngineClosed):
            call()
    with pytest.raises(EngineClosed):
        engine.stats()
    assert threading.active_count() == before
    assert model.open_walks == 0


def test_a_dead_engine_says_so_to_all(every, monkeypatch):  # noqa: F811
    with Engine(every) as engine:
        handle = engine.submit(text="a", hang=True)

        def explode():
            raise RuntimeError("the kernel broke")

        engine._service._runtime.post(explode)
        with pytest.raises(EngineClosed, match="the kernel broke"):
            handle.result(5)
        until(lambda: not engine._service.thread.is_alive())
        with pytest.raises(EngineClosed, match="died"):
            engine.health()
        with pytest.raises(EngineClosed, match="died"):
            engine.submit(text="a")


def test_warmup_runs_on_the_engines_thread(engine, monkeypatch):
    where = []
    monkeypatch.setattr(engine.model, "warmup", lambda: where.append(threading.current_thread()))
    assert engine.warmup()["seconds"] >= 0
    assert where == [engine._service.thread]

    def fail():
        raise OutOfMemory("no room for graphs")

    monkeypatch.setattr(engine.model, "warmup", fail)
    with pytest.raises(OutOfMemory):
        engine.warmup()


def test_stats_count(engine):
    for _ in range(3):
        engine.generate(text="a")
    stats = engine.stats()
    assert stats["requests"]["completed"] == 3
    assert stats["tokens"]["generated_tokens"] == 9
    assert set(stats["latency"]["total_time"]) == {"p50", "p90", "p99"}
    assert stats["nodes"]["echo"]["calls"] == 12


def test_results_do_not_keep_the_engine_busy(engine):
    for _ in range(50):
        engine.generate(text="a", output_modalities=("latent",))
    gc.collect()
    assert engine._service._live == {}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"device": "tpu"}, "device"),
        ({"dtype": "int3"}, "dtype"),
        ({"load_format": "gguf"}, "load_format"),
        ({"max_running": 0}, "max_running"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_queue": -1}, "max_queue"),
        ({"kv_tokens": 0}, "kv_tokens"),
        ({"token_budget": 0}, "token_budget"),
        ({"memory_fraction": 1.5}, "memory_fraction"),
        ({"memory_fraction": "a"}, "memory_fraction"),
        ({"max_batch": "8"}, "max_batch"),
        ({"max_batch": 2.5}, "max_batch"),
        ({"max_batch": True}, "max_batch"),
        ({"max_queue": None}, "max_queue"),
        ({"cpu_threads": 0}, "cpu_threads"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(every, options, field):  # noqa: F811
    with pytest.raises(InvalidRequest) as refused:
        Engine(every, **options)
    assert refused.value.field == field


def test_an_unknown_model_is_not_found():
    with pytest.raises(ModelNotFound, match="did you mean 'orpheus"):
        Engine("orpheos")


@pytest.mark.parametrize("timeout", [0, -1, True, "1", float("inf"), float("nan"), 1e10])
def test_a_timeout_is_a_sensible_number_of_seconds(engine, timeout):
    with pytest.raises(InvalidRequest, match="seconds"):
        engine.generate(text="a", timeout=timeout)


def test_a_long_timeout_is_harmless(engine):
    for _ in range(200):
        engine.generate(text="a", timeout=1e8, count=0)
    assert len(engine._service._runtime._timers) < 100
    assert engine.generate(text="a").text


def test_a_stream_that_nobody_ever_looks_at_is_cancelled(engine):
    events = engine.generate(text="a", stream=True, hang=True)
    until(lambda: engine.stats()["requests"]["running"] == 1)
    del events
    gc.collect()
    until(lambda: engine.stats()["requests"]["stopped"] == 1)


def test_an_engine_that_nobody_holds_ends_by_itself(every):  # noqa: F811
    before = threading.active_count()
    engine = Engine(every)
    engine.generate(text="a")
    gone = weakref.ref(engine.model)
    del engine
    gc.collect()
    until(lambda: threading.active_count() == before)
    gc.collect()
    assert gone() is None


def test_a_stream_keeps_its_engine_alive(every):  # noqa: F811
    texts = [event.text for event in Engine(every).generate(text="a", stream=True, pause=0.01)]
    assert texts == ["a0 ", "a1 ", "a2 ", ""]


def test_a_forked_process_is_told_that_it_has_no_engine(engine):
    context = multiprocessing.get_context("fork")
    answers, said = context.Pipe(duplex=False)

    def child():
        try:
            engine.generate(text="a")
        except EngineClosed as error:
            said.send(str(error))

    process = context.Process(target=child)
    process.start()
    assert answers.poll(20)
    assert "forked" in answers.recv()
    process.join(20)
    assert engine.generate(text="a").text


def test_a_batch_may_be_longer_than_the_queue(every):  # noqa: F811
    with Engine(every, max_running=2, max_queue=3) as engine:
        results = engine.generate_batch([{"text": f"{i}-", "count": 1} for i in range(40)])
        assert [result.text for result in results] == [f"{i}-0 " for i in range(40)]


def test_output_modalities_must_be_names(engine):
    with pytest.raises(InvalidRequest, match="list of modalities"):
        engine.generate(text="a", output_modalities=5)


def test_arrays_of_a_result_are_plain_numpy(engine):
    result = engine.generate(text="a", output_modalities=("action", "latent"), count=1)
    assert type(result.actions) is np.ndarray
    assert result.latents[0].dtype == np.float32
