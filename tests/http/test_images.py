"""`/v1/images/generations`, driven by openai-python and by hand."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time

import pytest
import requests
from fastapi import FastAPI
from PIL import Image

from mstar.engine.traps import sleep
from mstar.http import create_app
from mstar.http.openai.images_ask import ImagesAsk
from mstar.http.openai.images_params import Params
from mstar.http.openai.images_surface import ImagesSurface, fitted, images_of
from mstar.http.openai.images_wire import Previews
from mstar.http.openai.surfaces import surfaces_of
from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter, Parameters
from tests.every_modality import CARD, picture
from tests.http.conftest import every_site, serving
from tests.http.pictures import opened, spied, strict
from tests.waiting import until

openai = pytest.importorskip("openai")

CAT = {"model": "every", "prompt": "a cat"}
SMALL = {**CAT, "size": "64x32"}


@pytest.fixture(scope="module")
def client(site):
    with strict(site) as client:
        yield client


@pytest.fixture
def asked(site, monkeypatch):
    return spied(site, monkeypatch)


def generate(site, **fields) -> requests.Response:
    return site.post("/v1/images/generations", json={**SMALL, **fields})


def shades(reply) -> list[int]:
    return [opened(item.b64_json).getpixel((0, 0))[0] for item in reply.data]


def test_an_image_is_what_the_engine_draws(client, site):
    before = int(time.time())
    reply = client.images.generate(**SMALL, extra_body={"seed": 7})
    drawn = site.engine.generate(
        text="a cat", output_modalities=("image",), width=64, height=32, seed=7
    )
    (item,) = reply.data
    assert base64.b64decode(item.b64_json) == drawn.images[0] == picture(64, 32, 7)
    assert item.url is None
    assert before <= reply.created <= time.time()
    assert (reply.size, reply.quality) == ("64x32", "medium")
    assert (reply.background, reply.output_format) == ("opaque", "png")
    usage = reply.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (5, 8, 13)
    assert usage.input_tokens_details.text_tokens == 5
    assert usage.input_tokens_details.image_tokens == 0


def test_seeds_follow_the_given_one(client, asked):
    reply = client.images.generate(**SMALL, n=4, extra_body={"seed": 100})
    assert shades(reply) == [100, 101, 102, 103]
    assert [arguments["seed"] for arguments in asked] == [100, 101, 102, 103]
    assert reply.usage.input_tokens == 5
    assert reply.usage.output_tokens == 4 * 8


def test_without_a_seed_each_image_has_its_own(client, asked):
    client.images.generate(**SMALL, n=10)
    client.images.generate(**SMALL, n=10)
    assert len({arguments["seed"] for arguments in asked}) == 20


def test_the_model_need_not_be_named(site):
    reply = site.post("/v1/images/generations", json={"prompt": "a cat", "size": "16x16"})
    assert reply.json()["size"] == "16x16"


@pytest.mark.parametrize("fields", [{}, {"size": "auto"}, {"size": None}])
def test_auto_is_the_size_of_the_model(site, fields):
    assert generate(site, **{"size": "auto", **fields}).json()["size"] == "1024x1024"


def test_edges_may_be_parameters(site):
    reply = generate(site, size="auto", width=48, height=80)
    assert reply.json()["size"] == "48x80"
    assert generate(site, size="auto", width=48).json()["size"] == "48x1024"


def test_parameters_may_be_nested_in_extra_body(site, asked):
    generate(site, extra_body={"seed": 3, "num_timesteps": 2})
    assert asked[0]["seed"] == 3
    assert asked[0]["num_timesteps"] == 2


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_formats(client, format):
    reply = client.images.generate(**SMALL, output_format=format, extra_body={"seed": 9})
    image = opened(reply.data[0].b64_json)
    assert image.format == format.upper()
    assert image.size == (64, 32)
    assert image.getpixel((5, 5))[0] == pytest.approx(9, abs=3)
    assert reply.output_format == format


def test_compression_reaches_the_encoder(client):
    sizes = [
        len(
            client.images.generate(**SMALL, output_format="jpeg", output_compression=quality)
            .data[0]
            .b64_json
        )
        for quality in (0, 100)
    ]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("given", "shown"),
    [("auto", "medium"), ("standard", "medium"), ("hd", "high"), ("low", "low"), ("max", "max")],
)
def test_quality_is_echoed_in_words_that_clients_know(client, given, shown):
    assert client.images.generate(**SMALL, quality=given).quality == shown


def test_what_changes_nothing_is_taken(client, site, asked):
    fields = {"style": "natural", "moderation": "low", "user": "me", "background": "opaque"}
    client.images.generate(**SMALL, **fields)
    assert set(asked[0]) - {"request_id"} == {
        *("text", "output_modalities", "stream", "timeout", "width", "height", "seed"),
    }


def test_unknown_fields_are_ignored_with_one_log_line(site, caplog):
    with caplog.at_level("WARNING", "mstar.http"):
        assert generate(site, sparkle=1, glitter=2).status_code == 200
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "ignored fields that every does not have: 'sparkle', 'glitter'"


def test_the_async_client_draws_too(site):
    async def main() -> list:
        url = f"{site.url}/v1"
        async with openai.AsyncOpenAI(
            base_url=url, api_key="none", _strict_response_validation=True
        ) as client:
            calls = [client.images.generate(**SMALL, extra_body={"seed": i}) for i in range(4)]
            return await asyncio.gather(*calls)

    assert [shades(reply) for reply in asyncio.run(main())] == [[0], [1], [2], [3]]


def test_an_engine_that_draws_nothing_is_an_error(site):
    reply = generate(site, tell=True)
    assert reply.status_code == 500
    assert reply.headers["x-should-retry"] == "false"
    assert "made no image (finish_reason=stop); it said: {" in reply.json()["error"]["message"]


def test_a_late_failure_of_one_ends_all(site):
    reply = generate(site, n=3, hang=True, timeout=0.1)
    assert reply.status_code == 504
    until(lambda: site.engine.stats()["requests"]["running"] == 0)


# -- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("partial_images", [0, 1, 2, 3])
def test_a_stream_has_as_many_partial_images_as_asked(client, partial_images):
    create = client.images.generate
    *partial, last = create(
        **SMALL, stream=True, partial_images=partial_images, extra_body={"seed": 5}
    )
    assert [event.type for event in partial] == ["image_generation.partial_image"] * partial_images
    assert [event.partial_image_index for event in partial] == list(range(partial_images))
    for event in partial:
        assert opened(event.b64_json).size == (32, 16)
        assert opened(event.b64_json).getpixel((0, 0))[0] == 5
        assert (event.size, event.quality, event.output_format) == ("64x32", "medium", "png")
    assert last.type == "image_generation.completed"
    assert base64.b64decode(last.b64_json) == picture(64, 32, 5)
    assert (last.size, last.background, last.output_format) == ("64x32", "opaque", "png")
    assert (last.usage.input_tokens, last.usage.output_tokens) == (5, 8)
    assert last.usage.total_tokens == 13


@pytest.mark.parametrize(("steps", "count"), [(1, 0), (2, 1), (3, 2), (5, 3), (6, 3), (50, 3)])
def test_few_steps_have_few_previews(client, steps, count):
    extra = {"steps": steps}
    events = list(client.images.generate(**SMALL, stream=True, partial_images=3, extra_body=extra))
    assert len(events) == count + 1


def test_previews_are_chosen_evenly():
    def chosen(steps: int, wanted: int) -> list[int]:
        every = max(1, (steps - 1) // wanted)
        ask = ImagesAsk([], Params(every=every), partial_images=wanted)
        previews, steps_shown = Previews(ask), []
        for step in range(every, steps, every):
            if previews.wants(steps):
                steps_shown.append(step)
                previews.sent += 1
        return steps_shown

    for steps in range(1, 120):
        for wanted in (1, 2, 3):
            assert len(chosen(steps, wanted)) == min(wanted, steps - 1)
    assert chosen(50, 3) == [16, 32, 48]
    assert chosen(50, 1) == [49]
    assert chosen(6, 3) == [2, 4, 5]


def test_the_events_on_the_wire(site):
    reply = generate(site, stream=True, partial_images=1, output_format="jpeg", quality="high")
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    blocks = reply.text.split("\n\n")
    assert blocks.pop() == ""
    names, datas = zip(*(block.split("\n") for block in blocks), strict=True)
    events = [json.loads(data.removeprefix("data: ")) for data in datas]
    assert [name.removeprefix("event: ") for name in names] == [e["type"] for e in events]
    assert [event["output_format"] for event in events] == ["jpeg", "jpeg"]
    assert [opened(event["b64_json"]).format for event in events] == ["JPEG", "JPEG"]
    common = {"type", "b64_json", "created_at", "size", "quality", "background", "output_format"}
    assert set(events[0]) == common | {"partial_image_index"}
    assert set(events[1]) == common | {"usage"}


def test_events_come_early_and_a_client_that_leaves_ends_the_drawing(site):
    body = {**SMALL, "stream": True, "partial_images": 3, "pause": 0.05, "steps": 80}
    with site.post("/v1/images/generations", json=body, stream=True) as reply:
        lines = reply.iter_lines()  # letting go of it ends the connection
        assert next(lines) == b"event: image_generation.partial_image"
        before = site.engine.stats()["requests"]
        assert before["running"] == 1
    until(lambda: site.engine.stats()["requests"]["running"] == 0)
    assert site.engine.stats()["requests"]["completed"] == before["completed"]


def test_a_failure_before_the_first_event_has_its_status(client):
    with pytest.raises(openai.BadRequestError) as error:
        list(client.images.generate(**{**SMALL, "size": "8x8"}, stream=True))
    assert error.value.param == "size"


def test_a_failure_in_the_middle_comes_in_band(client, site, monkeypatch):
    async def draw(request, params):
        request.emit_progress(4, 8, picture(16, 16, 0))
        await sleep(0.05)
        raise ZeroDivisionError("the brush broke")

    monkeypatch.setattr(site.engine.model, "_draw", draw)
    stream = client.images.generate(**SMALL, stream=True, partial_images=1)
    assert next(stream).type == "image_generation.partial_image"
    with pytest.raises(openai.APIError, match="the brush broke") as error:
        next(stream)
    assert set(error.value.body) == {"message", "type", "param", "code"}


# -- urls -----------------------------------------------------------------------------------------


def test_urls_lead_to_the_images_without_a_key():
    with every_site(api_key="secret") as site:
        body = {**SMALL, "response_format": "url", "n": 2, "seed": 4, "output_format": "webp"}
        assert site.post("/v1/images/generations", json=body).status_code == 401
        key = {"authorization": "Bearer secret"}
        reply = site.post("/v1/images/generations", json=body, headers=key).json()
        assert [set(item) for item in reply["data"]] == [{"url"}] * 2
        urls = [item["url"] for item in reply["data"]]
        assert all(url.startswith(f"{site.url}/v1/images/files/") for url in urls)
        assert all(len(url.rpartition("/")[2]) > 30 for url in urls)  # nobody guesses them
        for index, url in enumerate(urls):
            file = requests.get(url, timeout=30)
            assert file.headers["content-type"] == "image/webp"
            with Image.open(io.BytesIO(file.content)) as image:
                assert image.getpixel((3, 3))[0] == pytest.approx(4 + index, abs=3)
        head = requests.head(urls[0], timeout=30)
        assert int(head.headers["content-length"]) > 0
        assert not head.content
        assert requests.delete(urls[0], timeout=30).status_code == 401
        lost = requests.get(urls[0] + "x", timeout=30)
        assert lost.status_code == 404
        assert set(lost.json()["error"]) == {"message", "type", "param", "code"}


def test_urls_know_where_the_app_is_mounted(site):
    whole = FastAPI()
    whole.mount("/ai", create_app(site.engine))
    with serving(site.engine, whole) as mounted:
        body = {**SMALL, "response_format": "url"}
        (item,) = mounted.post("/ai/v1/images/generations", json=body).json()["data"]
        assert item["url"].startswith(f"{mounted.url}/ai/v1/images/files/")
        assert requests.get(item["url"], timeout=30).headers["content-type"] == "image/png"


# -- surfaces -------------------------------------------------------------------------------------


def card(*parameters: Parameter, inputs=("text",), outputs=("image",)) -> ModelCard:
    table = Parameters("painter", parameters)
    return ModelCard(
        name="painter",
        title="",
        entry="",
        inputs=inputs,
        outputs=outputs,
        parameters=table,
        repos={},
    )


def test_a_card_tells_what_its_model_can():
    bare = images_of(card())
    assert bare == ImagesSurface(
        width=None,
        height=None,
        seed=None,
        steps=None,
        previews=None,
        mask=None,
        edits=False,
    )
    edges = [Parameter(name, int, 768, high=1024) for name in ("width", "height")]
    steps = Parameter("num_timesteps", int, 50)
    able = images_of(card(*edges, steps, inputs=("text", "image")))
    assert (able.size, able.steps, able.edits) == ((768, 768), "num_timesteps", True)
    assert images_of(CARD).steps == "steps"
    assert images_of(card(outputs=("text",))) is None
    assert images_of(card(inputs=("image",))) is None


def test_a_card_without_images_in_has_no_edits():
    surfaces = surfaces_of(card())
    assert surfaces.images is not None
    assert surfaces.edits is None


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        ((640, 480), (640, 480)),
        ((4000, 3000), (1024, 768)),
        ((3000, 4000), (768, 1024)),
        ((1023, 100), (1023, 100)),
        ((20, 10), (32, 16)),
        ((100_000, 10), (1024, 16)),
    ],
)
def test_sizes_are_fitted_with_their_proportions(size, fits):
    edges = [Parameter(name, int, nullable=True, low=16, high=1024) for name in ("width", "height")]
    assert fitted(card(*edges), ImagesSurface(), *size) == fits
