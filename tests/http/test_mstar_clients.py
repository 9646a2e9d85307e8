"""`MStarClient` and `AsyncMStarClient` against the real server; each test runs with both.

What they do with broken replies is in `tests/test_client.py`, against a scripted server.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from mstar.client import (
    AsyncMStarClient,
    EngineOverloaded,
    InvalidRequest,
    MStarClient,
    RequestFailed,
    RequestTimeout,
)
from mstar.types import AudioBuffer
from tests.broken_media import gif
from tests.every_modality import PNG, picture
from tests.http.conftest import every_site
from tests.waiting import until

pytest.importorskip("httpx")

EVERYTHING = ("text", "audio", "image", "action", "latent")
ENDLESS = {"text": "x", "count": 100_000, "pause": 0.01}


class Both:
    """One of the two clients, made to look like the blocking one."""

    def __init__(self, kind: str, url: str) -> None:
        self.kind, self.url = kind, url

    def __call__(self, method: str, *args: Any, options: Any = None, **kwargs: Any) -> Any:
        """Call a method; of a stream, all events."""
        return self.many([(method, args, kwargs)], options)[0]

    def many(self, calls: list[tuple[str, tuple, dict]], options: Any = None) -> list[Any]:
        """Several calls at the same time, by one client."""
        options = {"base_url": self.url, "timeout": 30, **(options or {})}
        if self.kind == "sync":
            with MStarClient(**options) as client, ThreadPoolExecutor(len(calls)) as pool:
                return list(pool.map(lambda call: _call(client, *call), calls))
        return asyncio.run(_gather(options, calls))


def _call(client: MStarClient, method: str, args: tuple, kwargs: dict) -> Any:
    answer = getattr(client, method)(*args, **kwargs)
    return list(answer) if inspect.isgenerator(answer) else answer


async def _gather(options: dict, calls: list[tuple[str, tuple, dict]]) -> list[Any]:
    async def one(client: AsyncMStarClient, method: str, args: tuple, kwargs: dict) -> Any:
        answer = getattr(client, method)(*args, **kwargs)
        answer = await answer if inspect.iscoroutine(answer) else answer
        return [event async for event in answer] if hasattr(answer, "__aiter__") else answer

    async with AsyncMStarClient(**options) as client:
        return list(await asyncio.gather(*(one(client, *call) for call in calls)))


@pytest.fixture(params=["sync", "async"])
def ask(request, site) -> Both:
    return Both(request.param, site.url)


@pytest.fixture
def idle(site):
    """Nothing runs any more after the test."""
    yield
    until(lambda: site.engine.model.open_walks == 0)
    until(lambda: not site.app.state.front.live)


def test_a_result_has_every_modality_and_is_the_engines(ask, site):
    asked = {"text": "hé", "output_modalities": EVERYTHING, "count": 2, "seed": 1}
    there, here = ask("generate", **asked), site.engine.generate(**asked)
    assert there.text == here.text == "hé0 hé1 "
    assert there.images == here.images == [PNG + b"\0", PNG + b"\1"]
    assert there.audio.sample_rate == 24000
    assert np.array_equal(there.audio.pcm, here.audio.pcm)
    assert np.array_equal(there.actions, here.actions)
    assert there.actions.shape == (4, 7)
    assert [latent.shape for latent in there.latents] == [(1, 3, 4)] * 2
    assert np.array_equal(there.latents[1], here.latents[1])
    assert there.finish_reason == "stop"
    assert there.usage.generated_tokens == here.usage.generated_tokens == 2


def test_a_stream_has_the_events_of_the_engine(ask, site):
    asked = {"text": "x", "output_modalities": EVERYTHING, "count": 2, "request_id": "mine"}
    there, here = ask("stream", **asked), list(site.engine.stream(**asked))

    def of(kind: str) -> list[Any]:
        return [e for e in there if type(e).__name__ == kind and e.finish_reason is None]

    assert there[-1].finish_reason == here[-1].finish_reason == "stop"
    assert there[-1].metadata["request_id"] == "mine"
    assert "".join(event.text for event in of("TextChunk")) == "x0 x1 "
    assert sum(len(event.pcm) for event in of("AudioChunk")) == 480
    assert [event.data for event in of("ImageChunk")] == [PNG + b"\0", PNG + b"\1"]
    assert [event.actions[0, 0] for event in of("ActionChunk")] == [0, 1]
    assert [event.latents.shape for event in of("LatentChunk")] == [(1, 3, 4)] * 2


def test_the_shorthands_speak_and_draw(ask):
    assert ask("chat", "hi", count=1).text == "hi0 "
    assert len(ask("tts", "hi", voice="Chelsie").pcm) == 720
    drawn = ask("generate_image", "a cat", width=32, height=16, seed=5)
    assert drawn == picture(32, 16, 5)
    assert ask("health") == {"status": "healthy"}


def test_files_and_text_arrive_in_the_order_that_is_told(ask):
    wav = AudioBuffer(np.arange(100, dtype=np.int16), 16000).to_wav()
    red, blue = picture(8, 8, 200), picture(4, 4, 10)
    order = ("image", "audio", "text", "image", "audio")
    told = json.loads(
        ask(
            "generate",
            text="between",
            images=[red, ("second.png", blue)],
            audio=[wav, ("again.wav", wav)],
            input_modalities=order,
            tell=True,
        ).text
    )
    hashes = [f"{len(x)} bytes {hashlib.sha256(x).hexdigest()[:8]}" for x in (red, blue, wav, wav)]
    assert told["text"] == "between"
    assert told["images"] == hashes[:2]
    assert told["audio"] == hashes[2:]
    assert told["input_modalities"] == list(order)


@pytest.mark.parametrize("more", [{}, {"text": "what?", "images": gif(3, 3)}])
def test_images_that_move_are_videos_if_they_are_given_as_such(ask, more):
    videos = [gif(2, 2, frames=3), picture(8, 8, 9)]
    told = json.loads(ask("generate", video=videos, tell=True, **more).text)
    assert len(told.get("images", [])) == len(more) // 2
    hashes = [f"{len(x)} bytes {hashlib.sha256(x).hexdigest()[:8]}" for x in videos]
    assert told["video"] == hashes


def test_messages_arrive_with_their_media(ask):
    image = picture(8, 8, 77)
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    told = json.loads(
        ask("generate", messages=[{"role": "user", "content": parts}], tell=True).text
    )
    (turn,) = told["messages"]
    digest = hashlib.sha256(image).hexdigest()[:8]
    assert turn["content"][0]["image"] == f"{len(image)} bytes {digest}"
    assert turn["content"][1]["text"] == "what?"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"text": "x", "count": -1}, "count"),
        ({"text": "x", "cuont": 1}, "cuont"),
        ({"text": "x", "voice": "nobody"}, "voice"),
        ({"text": "x", "output_modalities": ("smell",)}, "output_modalities"),
    ],
)
def test_what_the_engine_refuses_the_client_refuses(ask, site, asked, field, stream):
    with pytest.raises(InvalidRequest) as here:
        site.engine.generate(**asked)
    with pytest.raises(InvalidRequest) as there:
        ask("generate", stream=stream, **asked)
    assert field in str(there.value)
    assert (there.value.status, here.value.field) == (400, field)


def test_a_model_that_fails_before_the_first_event(ask):
    for stream in (False, True):
        with pytest.raises(RequestFailed, match="poison in the batch") as failed:
            ask("generate", text="poison", stream=stream)
        assert failed.value.status == 500


def test_a_model_that_fails_in_the_middle_fails_after_what_there_was(ask, site, idle):
    with pytest.raises(RequestFailed, match="poison in the batch"):
        ask("stream", text="x", late_poison=True)
    with MStarClient(site.url) as client:
        events = client.stream(text="x", late_poison=True)
        assert next(events).text == "x0 "
        with pytest.raises(RequestFailed, match="poison in the batch") as failed:
            next(events)
    assert failed.value.status == 500


def test_a_full_queue_says_when_to_come_back():
    with every_site({"max_running": 1, "max_queue": 0}) as small, MStarClient(small.url) as busy:
        events = busy.stream(**ENDLESS)
        next(events)
        for kind in ("sync", "async"):
            with pytest.raises(EngineOverloaded, match="the limit is 1") as full:
                Both(kind, small.url)("generate", text="y")
            assert full.value.retry_after == 1
        events.close()
        until(lambda: small.engine.model.open_walks == 0)


def test_a_deadline_ends_the_request_on_both_sides(ask, idle):
    began = time.monotonic()
    with pytest.raises(RequestTimeout, match=r"within 0\.2 s"):
        ask("generate", text="x", hang=True, timeout=0.2)
    with pytest.raises(RequestTimeout) as late:
        ask("stream", **ENDLESS, timeout=0.3)
    assert late.value.partial.text.startswith("x0 x1 ")
    assert time.monotonic() - began < 5


def test_silence_ends_the_request_on_both_sides(ask, idle):
    with pytest.raises(RequestTimeout, match=r"silent for 0\.3 s"):
        ask("generate", text="x", hang=True, options={"timeout": 0.3})


def test_closing_a_stream_cancels_its_request(site, idle):
    with MStarClient(site.url) as client:
        events = client.stream(**ENDLESS)
        assert next(events).text == "x0 "
        assert site.engine.model.open_walks == 1
        events.close()
        until(lambda: site.engine.model.open_walks == 0)
        assert client.chat("next", count=1).text == "next0 "


@pytest.mark.parametrize("how", ["close", "break", "cancel"])
def test_leaving_an_async_stream_cancels_its_request(site, idle, how):
    async def leave() -> None:
        async with AsyncMStarClient(site.url) as client:
            if how == "cancel":
                task = asyncio.create_task(client.generate(text="x", hang=True))
                while not site.engine.model.open_walks:
                    await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                events = client.stream(**ENDLESS)
                async for event in events:
                    assert event.text == "x0 "
                    break
                if how == "close":
                    await events.aclose()
                del events
            await asyncio.to_thread(until, lambda: site.engine.model.open_walks == 0)
            assert (await client.chat("next", count=1)).text == "next0 "

    asyncio.run(leave())


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_fifty_at_once_share_a_client(ask, site, idle, method):
    # They meet: none ends before all of them run.
    calls = [(method, (), {"text": f"{i}-", "count": 4, "pause": 0.25}) for i in range(50)]
    most = _watch(site, lambda: ask.many(calls), lambda answers: _texts(answers, method))
    assert most == 50


def _texts(answers: list[Any], method: str) -> None:
    for i, answer in enumerate(answers):
        text = answer.text if method == "generate" else "".join(event.text for event in answer)
        assert text == "".join(f"{i}-{n} " for n in range(4))


def _watch(site: Any, work: Callable[[], Any], check: Callable[[Any], None]) -> int:
    """How many requests ran at a time, at most, during `work`."""
    most, over = 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, site.engine.model.open_walks)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        check(work())
    finally:
        over.set()
        watcher.join()
    return most
