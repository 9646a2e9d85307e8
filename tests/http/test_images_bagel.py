"""The images routes over BAGEL: its parameters by their own names, its sizes, its streams."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from mstar import Engine, ImageChunk, MStarClient, ProgressChunk, TextChunk
from mstar.http import create_app
from tests.http.conftest import serving
from tests.http.pictures import opened, spied, strict

pytest.importorskip("openai")

SMALL = {"model": "bagel", "prompt": "a cat", "size": "64x32"}
BRIEF = {"num_timesteps": 5, "seed": 1}
EDGES = {"width": 64, "height": 32}


@pytest.fixture(scope="module")
def site():
    with Engine("bagel-tiny") as engine, serving(engine, create_app(engine)) as site:
        yield site


@pytest.fixture(scope="module")
def client(site):
    with strict(site) as client:
        yield client


@pytest.fixture(scope="module")
def picture():
    out = io.BytesIO()
    Image.radial_gradient("L").resize((90, 60)).convert("RGB").save(out, "PNG")
    return out.getvalue()


def near(b64, png):
    """The same picture, but for the rounding of products of other heights."""
    one, other = opened(b64), Image.open(io.BytesIO(png))
    assert one.size == other.size
    assert max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) <= 1


GUIDANCE = {
    "guidance_scale": 5.0,
    "cfg_img_scale": 1.25,
    "cfg_interval": [0.2, 0.9],
    "cfg_renorm_type": "channel",
    "cfg_renorm_min": 0.5,
    "negative_prompt": "a dog",
    "timestep_shift": 2.0,
    "num_inference_steps": 4,
    "enable_taylorseer": True,
    "seed": 3,
}


def test_parameters_reach_the_model_by_their_own_names(client, site, monkeypatch):
    asked = spied(site, monkeypatch)
    reply = client.images.generate(**SMALL, n=2, extra_body=GUIDANCE)
    assert [{name: each[name] for name in GUIDANCE} for each in asked] == [
        GUIDANCE,
        {**GUIDANCE, "seed": 4},
    ]
    assert reply.size == "64x32"
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (5, 2 * 8)
    for item, seed in zip(reply.data, (3, 4), strict=True):
        drawn = site.engine.generate_image("a cat", **{**EDGES, **GUIDANCE, "seed": seed})
        near(item.b64_json, drawn)


def test_an_edit_has_the_size_of_its_image_and_parameters_in_its_form(client, site, picture):
    form = {**BRIEF, "cfg_interval": [0, 1], "cfg_renorm_type": "global", "negative_prompt": "dog"}
    reply = client.images.edit(
        model="bagel", prompt="a cat", image=("a.png", picture), extra_body=form
    )
    expected = site.engine.generate_image("a cat", images=picture, **form)
    near(reply.data[0].b64_json, expected)
    assert reply.usage.input_tokens_details.image_tokens > 0


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"num_images": 2}, "num_images", "use n"),
        ({"preview_every": 2}, "preview_every", "use stream and partial_images"),
        ({"size": "60x32"}, "size", "nearest: 48 and 64"),
        ({"size": "4096x32"}, "size", "at most 128"),
        ({"width": 64}, "size", "not both"),
        ({"cfg_renorm_type": "local"}, "cfg_renorm_type", "one of global"),
        ({"cfg_interval": [1, 0]}, "cfg_interval", "low <= high"),
        ({"guidance_scale": "x"}, "guidance_scale", "number"),
        ({"num_inference_steps": 1}, "num_inference_steps", "from 2 to 1000"),
        ({"n": 2, "latents": [[0.0] * 64] * 8}, "latents", "noise of one image, and n=2"),
        ({"negative_prompt": "x", "guidance_scale": 1}, "negative_prompt", "there is none"),
        ({"temperature": 1.0}, "temperature", "a thought before it"),
        ({"prompt": " "}, "prompt", "empty"),
        ({"style": "grim"}, "style", "vivid"),
        ({"background": "transparent"}, "background", "opaque"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_the_words_of_the_client(site, fields, param, says):
    reply = site.post("/v1/images/generations", json={**SMALL, **fields})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param
    assert says in error["message"]


def test_previews_come_before_the_image(client):
    events = list(client.images.generate(**SMALL, stream=True, partial_images=2, extra_body=BRIEF))
    assert [event.type.rpartition(".")[2] for event in events] == [
        *["partial_image"] * 2,
        "completed",
    ]
    assert {event.size for event in events} == {"64x32"}


def test_a_thought_is_not_part_of_an_image_alone(client):
    (item,) = client.images.generate(
        **SMALL, extra_body={**BRIEF, "think": True, "max_think_tokens": 6}
    ).data
    assert opened(item.b64_json).size == (64, 32)


def test_a_stream_is_the_same_in_process_and_over_http(site):
    asked = {"text": "a cat", "output_modalities": ("text", "image"), "max_think_tokens": 6}
    asked |= EDGES | BRIEF
    for told in ({}, {"progress": True, "preview_every": 2}):
        here = list(site.engine.generate(**asked, **told, stream=True))
        with MStarClient(site.url) as client:
            there = list(client.generate(**asked, **told, stream=True))
        kinds = [type(event) for event in here if event.finish_reason is None]
        assert kinds == [type(event) for event in there if event.finish_reason is None]
        order = [TextChunk] + [ProgressChunk] * bool(told) + [ImageChunk]
        assert list(dict.fromkeys(kinds)) == order
        if told:
            steps = [(e.step, e.preview) for e in here if isinstance(e, ProgressChunk)]
            assert steps == [(e.step, e.preview) for e in there if isinstance(e, ProgressChunk)]
            assert [step for step, _ in steps] == [1, 2, 3, 4]
            assert [step for step, preview in steps if preview] == [2]
