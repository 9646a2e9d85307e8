"""V-JEPA 2-AC from the shell and over HTTP."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from vjepa2_ac_data import ARRAYS, close

from mstar import Engine, MStarClient, cli
from mstar.http.app import create_app
from tests.http.conftest import serving

STATE = "states=" + str(ARRAYS["poses"][0, 0].tolist())


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = [Image.fromarray(frame) for frame in ARRAYS["frames_u8"]]
    frames[0].save("clip.png", save_all=True, append_images=frames[1:])
    frames[5].save("goal.png")


def mstar(*args):
    return CliRunner().invoke(cli.app, ["generate", "vjepa2_ac-tiny", "-a", "clip.png", *args])


def test_a_map_of_costs_is_drawn():
    done = mstar("-a", "goal.png", "-s", STATE, "-s", "energy=3", "--plot", "energy.png")
    assert done.exit_code == 0, done.output
    assert Image.open("energy.png").size == (514, 440)


def test_a_plan_goes_to_a_table_and_a_picture():
    quick = ("-s", "plan=true", "-s", "samples=8", "-s", "topk=4", "-s", "seed=1")
    done = mstar("-a", "goal.png", "-s", STATE, *quick, "-o", "plan.csv", "--plot", "plan.png")
    assert done.exit_code == 0, done.output
    assert np.loadtxt("plan.csv", delimiter=",", skiprows=1).shape == (2, 7)
    assert Image.open("plan.png").width == 900


def test_a_rollout_goes_to_an_archive():
    actions = "actions=" + str(ARRAYS["rollout_actions"][0].tolist())
    done = mstar("-s", STATE, "-s", actions, "-s", "rollout_horizon=4", "-o", "steps.npz")
    assert done.exit_code == 0, done.output
    steps = np.load("steps.npz")
    found = np.stack([steps[f"latents_{step}"][0] for step in range(4)])
    np.testing.assert_allclose(found, ARRAYS["rollout_reps"][0], atol=1e-4)


def test_a_map_without_a_goal_is_refused_before_anything_is_drawn():
    done = mstar("-s", STATE, "--plot", "energy.png")
    assert done.exit_code != 0
    assert "a goal is needed" in done.output + done.stderr


def test_the_same_requests_over_http():
    """As clients of such servers ask: latents are called video, scalar or tensor, and may come as
    lines."""
    actions, state = ARRAYS["rollout_actions"][0].tolist(), ARRAYS["poses"][0, 0].tolist()
    asked = {"actions": actions, "states": state, "rollout_horizon": 4, "stream_rollout": True}
    clip, goal = (Path(name).read_bytes() for name in ("clip.png", "goal.png"))
    with (
        Engine("vjepa2_ac-tiny", cpu_threads=1) as engine,
        serving(engine, create_app(engine)) as site,
    ):
        fields = {"output_modalities": "video", "model_kwargs": json.dumps(asked)}
        reply = site.post(data=fields, files={"files": ("clip.png", clip)})
        assert reply.status_code == 200, reply.text
        *lines, last = map(json.loads, reply.text.splitlines())
        planned = MStarClient(site.url).generate(
            images=[("clip.png", clip), ("goal.png", goal)],
            states=state,
            plan=True,
            samples=8,
            topk=4,
            seed=1,
            output_modalities=("action", "latent"),
        )
        scored = {name: ARRAYS[f"clip_mpc_{name}"] for name in ("actions", "states", "goal_hidden")}
        chosen = MStarClient(site.url).generate(
            video=("clip.png", clip),
            mpc=True,
            output_modalities=("scalar", "tensor", "video"),
            **scored,
        )
        scored = {"mpc": True, **{name: array.tolist() for name, array in scored.items()}}
        replies = [
            site.post(
                data={
                    "output_modalities": words,
                    "model_kwargs": json.dumps(scored),
                    "streaming": streaming,
                },
                files={"files": ("clip.png", clip)},
            )
            for words, streaming in (
                ("scalar,tensor,video", "false"),
                ("scalar,tensor", "true"),
                ("video", "false"),
            )
        ]
        refused = site.post(
            data={"model_kwargs": json.dumps({**asked, "rollout_horizon": 9})},
            files={"files": ("clip.png", clip)},
        )
    assert [line["modality"] for line in lines] == ["video"] * 4
    assert lines[3]["metadata"] == {
        "dtype": "float32",
        "shape": [1, 16, 66],
        "name": "predicted",
        "step": 4,
    }
    found = np.frombuffer(base64.b64decode(lines[3]["data"]), "<f4").reshape(16, 66)
    np.testing.assert_allclose(found, ARRAYS["rollout_reps"][0, 3], atol=1e-4)
    assert last["metadata"]["finish_reason"] == "stop"
    assert planned.actions.shape == (2, 7)
    assert [costs.shape for costs in planned.latents] == [(8,)] * 10
    assert chosen.raw[0].metadata["best_index"] == ARRAYS["clip_mpc_costs_l1"].argmin()
    close(chosen.latents[0], "clip_mpc_costs_l1", 1e-5)
    close(chosen.latents[1], "clip_mpc_predicted")
    whole, lined, only = replies
    outputs = whole.json()["outputs"]
    assert {name: len(entries) for name, entries in outputs.items()} == dict.fromkeys(
        ("tensor", "scalar", "video"), 1
    )
    (best,) = np.frombuffer(base64.b64decode(outputs["scalar"][0]["data"]), "<i8")
    assert best == ARRAYS["clip_mpc_costs_l1"].argmin()
    costs = np.frombuffer(base64.b64decode(outputs["tensor"][0]["data"]), "<f4")
    close(costs, "clip_mpc_costs_l1", 1e-5)
    assert outputs["video"][0]["metadata"]["shape"] == list(ARRAYS["clip_mpc_predicted"].shape)
    lines = [json.loads(line)["modality"] for line in lined.text.splitlines()]
    assert lines[:-1] == ["tensor", "scalar"]  # what was not asked for, and is large, is not made
    shapes = {k: [e["metadata"]["shape"] for e in v] for k, v in only.json()["outputs"].items()}
    assert shapes == {"latent": [[6]], "video": [[6, 48, 66]]}
    assert refused.status_code == 400
    assert "rollout_horizon" in refused.text
