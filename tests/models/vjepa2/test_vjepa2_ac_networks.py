"""The networks of V-JEPA 2-AC, poses and the planner's arithmetic, against the goldens."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image
from vjepa2_ac_data import ARRAYS, GOLDENS, REPS, SEARCHES, TINY, close, frames, networks

from mstar.engine.weights import Checkpoint, randomize
from mstar.errors import InvalidRequest, WeightsError
from mstar.models.vjepa2.ac_config import AcConfig
from mstar.models.vjepa2.ac_predictor import Frames
from mstar.models.vjepa2.card_ac import PLANNING
from mstar.models.vjepa2.cem import Cem, cost
from mstar.models.vjepa2.networks import AcNetworks, load_ac_networks
from mstar.models.vjepa2.poses import trajectory
from mstar.models.vjepa2.preprocess import pixels, squares
from mstar.models.vjepa2.rollout import Start, at_once, roll, run_through
from mstar.models.vjepa2.rotary import rotation


@pytest.fixture(scope="module")
def net():
    return networks()


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def rolled(predictor, *given, **more) -> torch.Tensor:
    return run_through(roll(at_once(predictor), predictor, *given, **more))


def seen() -> torch.Tensor:
    return squares(Image.fromarray(frame) for frame in ARRAYS["frames_u8"])


def test_frames_become_pixels_without_margin_and_antialiasing():
    close(pixels(seen(), (32, 32)).transpose(0, 1)[None], "clip", 1e-5)


def test_every_frame_is_encoded_by_itself_and_normed(net):
    close(net.encode_frames(net.pixels(seen())).flatten(0, 1)[None], "reps")
    raw = net.encoder.encode_static(pixels(seen(), (32, 32)))
    close(raw.flatten(0, 1)[None], "encoder_out_per_frame")


def test_frames_can_be_one_clip(net):
    close(net.encode_clip(net.pixels(seen())).flatten(0, 1)[None], "natural_clip_encoder_out")


def test_tokens_and_first_block(net):
    predictor, call = net.predictor, frames(3)
    tokens = torch.cat(predictor.tokens(call), 2).flatten(1, 2)
    close(tokens, "ac_tokens_in")
    block = predictor.predictor_blocks[0]
    projected = block.project(tokens, predictor._turned(0, 3))
    close(block.finish(tokens, predictor._attend(0, call, *projected)), "ac_block0_out")


def test_one_pass_over_several_frames(net):
    predictor = net.predictor
    close(predictor.latents(predictor([frames(1)])[0]).flatten(1, 2), "ac_single_step_T1")
    found = predictor.latents(predictor([frames(3)])[0]).flatten(1, 2)
    close(found, "ac_teacher_forced_T3")
    close(predictor.norm(found), "ac_teacher_forced_T3_normed")


def test_frame_after_frame_with_a_cache_is_the_same_as_all_at_once(net):
    predictor, whole = net.predictor, frames(5)
    cache, found = predictor.cache(1, 5), []
    for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
        given = (whole.latents[:, part], whole.actions[:, part], whole.states[:, part])
        found += predictor([Frames(*given, cache=cache)])
    together = predictor([whole])[0]
    torch.testing.assert_close(torch.cat(found, 1), together, atol=1e-5, rtol=0)


def test_calls_in_one_batch_are_those_alone(net):
    """Two samples from one context, and one of another, each with a cache of its own."""
    predictor, actions = net.predictor, GOLDENS["rollout_actions"]
    states = GOLDENS["rollout_poses"]

    def calls() -> list[Frames]:
        return [
            Frames(REPS[:, :1], actions[:, :1], states[:1, :1], cache=predictor.cache(2, 2)),
            Frames(REPS[:, 3:4], actions[:1, 1:2], states[:1, 1:2], cache=predictor.cache(1, 2)),
        ]

    alone = [predictor([call])[0] for call in calls()]
    for one, other in zip(alone, predictor(calls()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["rollout_reps", "rollout_given_states_reps"])
def test_rollouts(net, name):
    actions = GOLDENS["rollout_actions"]
    states = GOLDENS["rollout_given_states"]
    if name == "rollout_reps":
        states = trajectory(GOLDENS["poses"][:, 0], actions)
        close(states, "rollout_poses", 1e-5)
    start = Start(REPS[0, :1], together=name == "rollout_reps")
    for steps in range(1, 5):
        found = rolled(net.predictor, start, actions[:, :steps], states)
        torch.testing.assert_close(found, GOLDENS[name][:, :steps], atol=1e-4, rtol=0)


def test_cached_rollouts_are_those_recomputed_also_from_several_frames(net):
    predictor, seen_frames, horizon = net.predictor, 3, 3
    actions = 0.05 * torch.randn(4, seen_frames - 1 + horizon, 7, generator=_generator())
    actions[:, : seen_frames - 1] = GOLDENS["pose_diffs"][:, : seen_frames - 1]
    poses = GOLDENS["poses"][:, :seen_frames]
    past = seen_frames - 1
    context = predictor.cache(1, past)
    predictor([Frames(REPS[:, :past], actions[:1, :past], poses[:, :past], cache=context)])
    ahead = trajectory(poses[:, past], actions[:, past:])
    start = Start(REPS[0, past:seen_frames], context=context)
    found = rolled(predictor, start, actions[:, past:], ahead)[:, -1:]

    latents = REPS[:, :seen_frames].expand(4, -1, -1, -1)
    states = torch.cat([poses[:, :past].expand(4, -1, -1), ahead], 1)
    for step in range(horizon):
        count = seen_frames + step
        given = Frames(latents, actions[:, :count], states[:, :count])
        again = predictor.norm(predictor.latents(predictor([given])[0][:, -1:]))
        latents = torch.cat([latents, again], 1)
    torch.testing.assert_close(found, again, atol=5e-5, rtol=0)


def test_models_with_cameras_and_wide_frames():
    """Frames of 2 x 3 patches, a token for the camera, several samples: a cached rollout is the
    recomputed one. A wide grid's columns lie as close as if it were square."""
    sizes = {"img_size": [16, 24], "use_extrinsics": True, "depth": 1, "pred_num_heads": 2}
    config = AcConfig.from_dict({**json.loads((TINY / "config.json").read_text()), **sizes})
    with torch.device("meta"):
        net = AcNetworks(config)
    predictor = randomize(net, device="cpu", dtype=None).predictor
    given = (torch.randn(1, 2, 6, 66), torch.randn(3, 2, 7), torch.randn(3, 2, 7))
    cameras = torch.randn(1, 2, 6)
    whole = predictor([Frames(*given, cameras)])[0]
    cache = predictor.cache(3, 2)
    for step in range(2):
        part = slice(step, step + 1)
        parts = (each[:, part] for each in (*given, cameras))
        found = predictor([Frames(*parts, cache)])[0]
        torch.testing.assert_close(found[:, 0], whole[:, step], atol=1e-5, rtol=0)
    expected = rotation(*torch.tensor([1.0, 0.0, 2 * 2 / 3]).view(3, 1), config.predictor.head_dim)
    row = predictor.frame_tokens + config.conditions + 2  # of the second frame, the last column
    turned = predictor._turned(0, 2)
    torch.testing.assert_close(turned.own[row], expected.own[0])
    torch.testing.assert_close(turned.other[row], expected.other[0])


def test_scores_of_candidates(net):
    actions = GOLDENS["score_actions"]

    def last(hidden: torch.Tensor) -> torch.Tensor:
        return cost(net.predictor.latents(hidden)[:, 0], REPS[0, 5], "l1", 1e-5)

    states = trajectory(GOLDENS["poses"][:, 0], actions)
    found = rolled(net.predictor, Start(REPS[0, :1]), actions, states, last=last)
    close(found, "score_costs_l1", 1e-5)


def after(pose: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    return trajectory(pose, change.unsqueeze(1))[:, 1]


def test_poses():
    given = (GOLDENS[name].flatten(0, 1) for name in ("pose_in", "pose_delta"))
    close(after(*given).unsqueeze(1), "pose_out", 1e-5)
    poses, moves = GOLDENS["poses"][0], GOLDENS["pose_diffs"][0]
    near = torch.testing.assert_close
    near(after(poses[:-1], moves), poses[1:], atol=1e-5, rtol=0)


def test_a_pose_becomes_canonical_even_if_nothing_changes():
    pose = torch.tensor([[0.0, 0, 0, 0.1, math.pi - 0.2, 0.3, 0.5]])
    found = after(pose, torch.zeros(1, 7))
    assert found[0, 4].abs() <= math.pi / 2
    torch.testing.assert_close(after(found, torch.zeros(1, 7)), found, atol=1e-6, rtol=0)


def test_a_gripper_is_never_more_than_closed_or_open():
    pose = torch.tensor([[0.0, 0, 0, 0, 0, 0, 0.9]])
    change = torch.zeros(2, 7)
    change[0, 6], change[1, 6] = 0.3, -2.0
    assert after(pose, change)[:, 6].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", SEARCHES)
def test_candidates_keep_to_their_limits(name):
    settings = dict(SEARCHES[name])
    noise = torch.tensor(settings.pop("noise"))[0]
    settings["axis"] = {int(k): v for k, v in settings.get("axis", {}).items()}
    cem = Cem(**settings)
    actions = cem.candidates(*cem.start(torch.device("cpu")), 100 * noise)
    assert actions.shape == (cem.samples, cem.horizon, 7)
    assert actions[..., :3].abs().max() <= cem.maxnorm
    assert not actions[..., 3:6].any()
    for index, value in cem.axis.items():
        assert (actions[..., index] == value).all()
    free = actions[:, : cem.close_gripper, 6]
    assert free.abs().max() <= 0.75
    closing = actions[:, cem.horizon if cem.close_gripper is None else cem.close_gripper :, 6]
    assert (closing == 1).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 0),
        ("horizon", True),
        ("topk", 1),
        ("topk", 500),
        ("maxnorm", float("nan")),
        ("momentum_mean", 1.5),
        ("axis", {4: 0.0}),
        ("close_gripper", -1),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(InvalidRequest, match=field):
        PLANNING.validate({field: value})


def test_the_original_file_is_read_without_its_wrappers(net, tmp_path):
    """Names with prefixes, beside what only training needs; no config.json: sizes as published."""
    stored = Checkpoint.open(TINY)
    parts: dict[str, dict] = {"encoder": {}, "predictor": {}}
    for name in stored.names():
        part, rest = name.split(".", 1)
        parts[part][rest] = stored.read(name)
    file = tmp_path / "vjepa2-ac-vitg.pt"
    torch.save({**parts, "target_encoder": parts["encoder"], "opt": {}, "scaler": None}, file)
    config = AcConfig.from_folder(TINY)
    loaded = load_ac_networks(tmp_path, device="cpu", dtype=torch.float32, config=config)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name])
    assert AcConfig.from_folder(tmp_path) == AcConfig()
    with pytest.raises(WeightsError, match="expected \\[1408\\]"):
        load_ac_networks(tmp_path, device="cpu", dtype=torch.float32)


def test_the_published_sizes():
    with torch.device("meta"):
        full = AcNetworks(AcConfig())
    assert sum(p.numel() for p in full.predictor.parameters()) == 305_220_992
    assert sum(p.numel() for p in full.parameters()) == 1_317_394_944
    assert full.config.max_frames == 32


@pytest.mark.parametrize(
    "change", [{"img_size": [30, 32]}, {"pred_num_heads": 7}, {"depth": 0}, {"use_extrinsics": 1}]
)
def test_a_config_that_no_model_has_is_refused(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(change))
    with pytest.raises(WeightsError, match="must"):
        AcConfig.from_folder(tmp_path)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
