"""What the operator of a policy can choose, and the same policy over the native route."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mstar import Engine, InvalidRequest, MStarClient
from mstar.http import create_app
from mstar.http.msgpack_numpy import unpackb
from tests.every_modality import every  # noqa: F401
from tests.http.policies import (
    actions,
    asked,
    joined,
    observation,
    served,
)

# -- what the operator chooses -----------------------------------------------------------------


def test_a_prompt_where_there_is_none(libero):
    sent = observation("libero")
    prompt = sent.pop("prompt")
    options = {"robot": "libero", "default_prompt": prompt}
    with served(libero.engine, **options) as site, joined(site.url) as connection:
        connection.recv(10)
        found = asked(connection, sent)["actions"]
        np.testing.assert_allclose(found, actions("libero"), atol=5e-5, rtol=0)
        assert not np.array_equal(asked(connection, sent | {"prompt": "fold"})["actions"], found)
    with joined(libero.url) as connection:
        connection.recv(10)
        assert "prompt, the task, is missing" in asked(connection, sent)


def test_the_robot_of_the_checkpoint_and_a_pose():
    image = np.zeros((56, 56, 3), np.uint8)
    sent = {"observation.images.base_0_rgb": image, "observation.state": np.zeros(8)}
    with (
        Engine("pi05-tiny") as engine,
        served(engine, reset_pose=[0, 1.5]) as site,
        joined(site.url) as connection,
    ):
        metadata = unpackb(connection.recv(10))
        assert metadata["robot"] == "lerobot"
        assert metadata["reset_pose"] == [0, 1.5]
        assert asked(connection, sent | {"prompt": "go"})["actions"].shape == (10, 7)
        assert asked(connection, sent | {"task": "go"})["actions"].shape == (10, 7)


def test_a_prompt_whose_key_has_dots():
    image, robot = np.zeros((56, 56, 3), np.uint8), {"images": {"base_0_rgb": "front"}}
    robot |= {"state": {"arm.q": 8}, "prompt": "language.task"}
    sent = {"front": image, "arm": {"q": np.zeros(8)}}
    with (
        Engine("pi05-tiny") as engine,
        served(engine, robot=robot) as site,
        joined(site.url) as connection,
    ):
        connection.recv(10)
        for prompt in ({"prompt": "go"}, {"language": {"task": "go"}}, {"language.task": b"go"}):
            assert asked(connection, sent | prompt)["actions"].shape == (10, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"robot": "aloha"}, "14"),
        ({"robot": "spot"}, "must be one of droid, libero, aloha"),
        ({"default_prompt": " "}, "default_prompt"),
        ({"reset_pose": [float("nan")]}, "reset_pose"),
    ],
)
def test_what_the_policy_cannot_serve(libero, options, message):
    with pytest.raises(InvalidRequest, match=message):
        create_app(libero.engine, **options)


@pytest.mark.parametrize("options", [{"robot": "droid"}, {"default_prompt": "go"}])
def test_a_robot_without_a_policy(every, options):  # noqa: F811
    with Engine(every) as engine, pytest.raises(InvalidRequest, match="no policy"):
        create_app(engine, **options)


# -- the native route --------------------------------------------------------------------------


def test_the_same_policy_over_the_native_route(libero, tmp_path):
    files = [tmp_path / f"{slot}.png" for slot in ("base", "wrist")]
    sent = observation("libero")
    for file, key in zip(files, ("observation/image", "observation/wrist_image"), strict=True):
        Image.fromarray(sent[key]).save(file)
    arguments = {"text": sent["prompt"], "images": [str(file) for file in files]}
    arguments |= {"robot_state": sent["observation/state"], "output_modalities": ("action",)}
    with MStarClient(libero.url) as client:
        result = client.generate(**arguments)
        np.testing.assert_allclose(result.actions, actions("libero"), atol=5e-5, rtol=0)
        assert result.actions.dtype == np.float32
        (event,) = [e for e in client.stream(**arguments) if e.modality == "action"]
        np.testing.assert_array_equal(event.actions, result.actions)
        assert event.metadata["cameras"] == ["base_0_rgb", "left_wrist_0_rgb"]
    form = {
        "text": sent["prompt"],
        "output_modalities": "action",
        "streaming": "false",
        "model_kwargs": json.dumps({"robot_state": sent["observation/state"], "seed": 1}),
    }
    reply = libero.post(data=form, files=[("files", file.read_bytes()) for file in files])
    (entry,) = reply.json()["outputs"]["action"]
    assert entry["metadata"]["dtype"] == "float32"
    assert entry["metadata"]["shape"] == [10, 7]
