"""`/v1/images/edits`, as a form and as JSON."""

from __future__ import annotations

import asyncio
import base64
import io

import pytest
from PIL import Image

from mstar.http import create_app
from mstar.http.openai import surfaces
from mstar.http.openai.images_surface import ImagesSurface, images_of
from tests.every_modality import CARD, picture
from tests.http.conftest import serving
from tests.http.pictures import data_url, mask_of, opened, spied, strict

openai = pytest.importorskip("openai")

RED, BLUE = picture(48, 32, 255), picture(80, 64, 0)
ASK = {"model": "every", "prompt": "a hat on it"}


@pytest.fixture(scope="module")
def client(site):
    with strict(site) as client:
        yield client


@pytest.fixture
def asked(site, monkeypatch):
    return spied(site, monkeypatch)


def test_one_image_is_edited_at_its_size(client, asked):
    reply = client.images.edit(**ASK, image=RED, extra_body={"seed": 7})
    (item,) = reply.data
    assert opened(item.b64_json).size == (48, 32)
    assert reply.size == "48x32"
    (arguments,) = asked
    assert arguments["images"] == [RED]
    assert arguments["text"] == "a hat on it"
    assert arguments["input_modalities"] == ("image", "text")
    assert arguments["seed"] == 7


def test_several_images_keep_their_order(client, asked):
    jpeg = io.BytesIO()
    Image.new("RGB", (20, 20)).save(jpeg, "JPEG")
    files = [BLUE, RED, ("x.png", jpeg.getvalue()), *[RED] * 13]
    reply = client.images.edit(**ASK, image=files, size="32x16")
    assert asked[0]["images"] == [BLUE, RED, jpeg.getvalue(), *[RED] * 13]
    assert asked[0]["input_modalities"] == ("image",) * 16 + ("text",)
    assert reply.size == "32x16"


def test_the_mask_reaches_the_model(client, asked):
    mask = mask_of(80, 64)
    client.images.edit(**ASK, image=[BLUE, RED], mask=mask)
    assert asked[0]["mask"] == mask


def test_forms_have_their_types_from_the_model(client, asked):
    extra = {
        "seed": 5,
        "temperature": 0.5,
        "ignore_eos": True,
        "stop": ["a", "b"],
        "num_timesteps": 4,
    }
    reply = client.images.edit(
        **ASK,
        image=RED,
        n=2,
        output_format="jpeg",
        output_compression=80,
        quality="standard",
        user="me",
        input_fidelity="low",
        background="auto",
        extra_body=extra,
    )
    assert [arguments["seed"] for arguments in asked] == [5, 6]
    for arguments in asked:
        assert arguments["temperature"] == 0.5
        assert arguments["ignore_eos"] is True
        assert arguments["stop"] == ["a", "b"]
        assert arguments["num_timesteps"] == 4
    assert opened(reply.data[1].b64_json).format == "JPEG"
    assert reply.usage.output_tokens == 8


def test_lists_may_be_json_and_empty_fields_are_not_given(site, asked):
    fields = {"prompt": "x", "size": "", "n": "", "stop": '["a", "b"]', "seed": "", "steps": " 3 "}
    reply = site.post("/v1/images/edits", data=fields, files={"image": RED})
    assert reply.status_code == 200
    assert asked[0]["stop"] == ["a", "b"]
    assert asked[0]["steps"] == 3


@pytest.mark.parametrize("partial_images", [0, 3])
def test_edits_stream(client, partial_images):
    events = client.images.edit(
        **ASK, image=RED, stream=True, partial_images=partial_images, extra_body={"seed": 9}
    )
    *partial, last = events
    assert [event.type for event in partial] == ["image_edit.partial_image"] * partial_images
    assert [event.partial_image_index for event in partial] == list(range(partial_images))
    assert last.type == "image_edit.completed"
    assert base64.b64decode(last.b64_json) == picture(48, 32, 9)
    assert last.usage.input_tokens == len("a hat on it")


def test_the_async_client_edits_too(site):
    async def main() -> list[str]:
        url = f"{site.url}/v1"
        async with openai.AsyncOpenAI(
            base_url=url, api_key="none", _strict_response_validation=True
        ) as client:
            stream = await client.images.edit(
                **ASK, image=[RED, BLUE], stream=True, partial_images=1
            )
            return [event.type async for event in stream]

    assert asyncio.run(main()) == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    "images",
    [
        {"images": [{"image_url": data_url(RED)}, {"image_url": data_url(BLUE)}]},
        {"image": [data_url(RED), data_url(BLUE)]},
        {"images": [{"image_url": {"url": data_url(RED)}}, data_url(BLUE)]},
    ],
)
def test_json_names_images_by_data_urls(site, asked, images):
    body = {**ASK, **images, "mask": {"image_url": data_url(mask_of(48, 32))}, "steps": 2}
    reply = site.post("/v1/images/edits", json=body)
    assert reply.json()["size"] == "48x32"
    assert asked[0]["images"] == [RED, BLUE]
    assert asked[0]["mask"] == mask_of(48, 32)
    assert asked[0]["steps"] == 2


def test_one_image_in_json(site, asked):
    reply = site.post("/v1/images/edits", json={**ASK, "image": data_url(RED), "n": 2})
    assert len(reply.json()["data"]) == 2
    assert asked[0]["images"] == [RED]


def served_as(site, monkeypatch, surface: ImagesSurface):
    """The model with another surface of images."""
    monkeypatch.setitem(surfaces._OF_FAMILY, "every", surfaces.Surfaces(images=surface))
    return serving(site.engine, create_app(site.engine))


def test_a_family_may_say_what_its_words_are(site, asked, monkeypatch):
    surface = ImagesSurface(
        steps="steps",
        fewer_steps=1,
        size=(64, 64),
        keeps_size=False,
    )
    with served_as(site, monkeypatch, surface) as other:
        body = {"prompt": "x", "steps": 50, "stream": True, "partial_images": 3}
        reply = other.post("/v1/images/generations", json=body)
        assert asked[0]["steps"] == 50
        assert asked[0]["preview_every"] == 16  # of 49 steps
        assert reply.text.count("event: image_generation.partial_image") == 3
        reply = other.post("/v1/images/edits", data={"prompt": "x"}, files={"image": RED})
        assert reply.json()["size"] == "64x64"


def test_what_a_model_lacks_is_refused_by_name(site, monkeypatch):
    bare = ImagesSurface(None, None, None, None, 0, None, None, edits=True)
    with served_as(site, monkeypatch, bare) as other:
        for field, value in (("size", "64x64"), ("input_fidelity", "high"), ("mask", None)):
            files = {"image": RED, **({"mask": mask_of(48, 32)} if field == "mask" else {})}
            data = {"prompt": "x", **({field: value} if value else {})}
            error = other.post("/v1/images/edits", data=data, files=files).json()["error"]
            assert (error["param"], error["code"]) == (field, "unsupported_parameter")


def test_a_model_without_previews_sends_the_image_only(site, monkeypatch):
    surface = ImagesSurface(steps=None, previews=None, size=(32, 32))
    with served_as(site, monkeypatch, surface) as other:
        body = {"prompt": "x", "stream": True, "partial_images": 3}
        reply = other.post("/v1/images/generations", json=body)
        assert reply.text.count("event: ") == 1
        assert reply.text.startswith("event: image_generation.completed")


def test_routes_that_are_missing_name_those_to_use(site, monkeypatch):
    surface = images_of(CARD)
    with served_as(site, monkeypatch, ImagesSurface(**{**vars(surface), "edits": False})) as other:
        for path in ("edits", "variations"):
            reply = other.post(f"/v1/images/{path}", json={})
            assert reply.status_code == 404
            assert "use POST /v1/images/generations" in reply.json()["error"]["message"]
