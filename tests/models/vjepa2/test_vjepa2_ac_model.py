"""V-JEPA 2-AC behind the Engine: every flow against the goldens, alone and in company."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from vjepa2_ac_data import ARRAYS, SEARCHES, TINY, close

from mstar import Engine, InvalidRequest, RequestCancelled
from mstar.engine.captured import CapturedSteps
from mstar.models.vjepa2.ac_requests import Search
from mstar.models.vjepa2.cem import Budget, Cem
from tests.recording import replays

CLIP, POSES, MOVES = ARRAYS["frames_u8"], ARRAYS["poses"][0], ARRAYS["pose_diffs"][0]
CANDIDATES = {"actions": ARRAYS["clip_mpc_actions"], "states": ARRAYS["clip_mpc_states"]}
GOAL = ARRAYS["clip_mpc_goal_hidden"]


@pytest.fixture(scope="module")
def engine():
    with Engine("vjepa2_ac-tiny", cpu_threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def context(engine):
    return engine.encode(CLIP[:1])


@pytest.fixture(scope="module")
def goal(engine):
    return engine.encode(CLIP[5])


def png(frame: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "PNG")
    return out.getvalue()


# -- requests ----------------------------------------------------------------------------------


def test_a_single_pass_with_an_action_a_frame(engine):
    result = engine.generate(video=CLIP[:3], actions=MOVES[:3], states=POSES[:3])
    close(result.latents[0], "ac_teacher_forced_T3")
    assert result.raw[0].metadata == {
        "dtype": "float32",
        "shape": [1, 48, 66],
        "name": "predicted",
    }


def test_a_clip_with_an_action_a_tubelet_is_one_natural_clip(engine):
    one = {name: rows[0].tolist() for name, rows in CANDIDATES.items()}
    for clip in (None, "natural"):
        result = engine.generate(video=CLIP, clip=clip, **one)
        np.testing.assert_allclose(
            result.latents[0], ARRAYS["clip_mpc_predicted"][:1], atol=2e-5, rtol=0
        )


def test_the_encoder_alone(engine):
    close(engine.generate(video=CLIP, skip_predictor=True).latents[0], "natural_clip_encoder_out")
    frames = engine.generate(video=CLIP, skip_predictor=True, clip="frames")
    close(frames.latents[0], "reps")


@pytest.mark.parametrize("cost", ["l1", "l2", "cosine"])
def test_candidates_over_a_natural_clip(engine, cost):
    """With `l1` latents are called as clients of other servers call them."""
    result = engine.generate(
        video=CLIP,
        mpc=True,
        goal_hidden=GOAL.tolist() if cost == "l2" else GOAL[0],
        cost=cost,
        output_modalities=(
            ("scalar", "tensor", "video", "action") if cost == "l1" else ("latent", "action")
        ),
        **CANDIDATES,
    )
    costs, predicted = result.latents
    close(costs, f"clip_mpc_costs_{cost}", 1e-5)
    close(predicted, "clip_mpc_predicted")
    best = int(ARRAYS[f"clip_mpc_costs_{cost}"].argmin())
    assert result.raw[0].metadata["best_index"] == best
    np.testing.assert_array_equal(result.actions, CANDIDATES["actions"][best])


def test_a_stand_in_for_the_goal(engine):
    result = engine.generate(
        video=CLIP, mpc=True, goal_hidden_fill=0.5, return_latents=False, **CANDIDATES
    )
    predicted = ARRAYS["clip_mpc_predicted"][:, -16:]
    np.testing.assert_allclose(result.latents[0], np.abs(predicted - 0.5).mean((1, 2)), atol=1e-5)
    assert len(result.latents) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_rollouts_with_states_given_and_integrated(engine, given, stream):
    """A clip of which one frame is seen: steps come one by one, also those of both samples."""
    states = ARRAYS["rollout_given_states"] if given else POSES[:1]
    result = engine.generate(
        video=CLIP,
        actions=ARRAYS["rollout_actions"],
        states=states,
        rollout_horizon=4,
        stream_rollout=stream,
    )
    name = "rollout_given_states_reps" if given else "rollout_reps"
    close(np.stack(result.latents, 1), name, 1e-4)
    assert [event.metadata.get("step") for event in result.raw[:-1]] == [1, 2, 3, 4]


@pytest.mark.parametrize("latents", [False, True])
def test_candidates_are_scored_on_rollouts(engine, latents):
    """The goal in both forms that JSON has for images."""
    url = "data:image/png;base64," + base64.b64encode(png(CLIP[5])).decode()
    result = engine.generate(
        video=CLIP,
        actions=ARRAYS["score_actions"],
        states=POSES[0],
        mpc=True,
        rollout_horizon=2,
        goal_image=url if latents else CLIP[5].tolist(),
        return_latents=latents,
    )
    close(result.latents[0], "score_costs_l1", 1e-5)
    assert len(result.latents) == 1 + latents


@pytest.mark.parametrize("name", SEARCHES)
def test_a_plan_as_a_request(engine, name):
    """The goal is an image beside the clip, as forms send it."""
    result = engine.generate(
        video=CLIP,
        images=[png(CLIP[5])],
        plan=True,
        states=POSES[:1],
        return_latents=True,
        output_modalities=("action", "latent"),
        **SEARCHES[name],
    )
    close(result.actions, f"cem_{name}/plan", 1e-5)
    close(np.stack(result.latents[:-1]), f"cem_{name}/sample_costs", 1e-5)
    assert result.latents[-1].shape == (1, SEARCHES[name]["horizon"], 16, 66)


def test_a_map_of_costs_is_that_of_its_actions(engine):
    """Axes x and z, 3 x 3 points, each action twice; the centre does nothing."""
    asked = {"video": CLIP, "goal_image": png(CLIP[5]), "states": POSES[:1]}
    result = engine.generate(energy=3, energy_axes="xz", energy_span=0.05, action_repeat=2, **asked)
    grid = result.latents[0]
    assert grid.shape == (3, 3)
    actions = np.zeros((2, 2, 7))
    actions[1, :, 0], actions[1, :, 2] = -0.05, 0.05
    scored = engine.generate(
        actions=actions, mpc=True, rollout_horizon=2, return_latents=False, **asked
    )
    np.testing.assert_allclose(grid[[1, 0], [1, 2]], scored.latents[0], atol=1e-6)


def test_requests_of_all_kinds_in_one_batch_are_those_alone(engine):
    requests = [
        {"video": CLIP[:3], "actions": MOVES[:3], "states": POSES[:3]},
        {"video": CLIP[:3], "actions": MOVES[:3], "states": POSES[:3]},
        {"video": CLIP, "skip_predictor": True},
        *(
            {
                "video": CLIP[first:],
                "actions": ARRAYS["rollout_actions"][0],
                "states": POSES[0],
                "rollout_horizon": horizon,
            }
            for first, horizon in ((0, 4), (1, 4), (0, 3))
        ),
    ]
    alone = [engine.generate(**request) for request in requests]
    together = engine.generate_batch(requests)
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one.latents, other.latents, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=0)
    sizes = {node.name: node.batch_sizes for node in engine.model.nodes}
    assert max(sizes["encode"]) > 1
    assert max(sizes["predict"]) > 1


# -- functions ---------------------------------------------------------------------------------


def test_encode_and_predict(engine):
    reps = engine.encode(list(CLIP))
    assert reps.shape == (6, 16, 66)
    close(np.asarray(reps).reshape(1, 96, 66), "reps")
    assert np.array_equal(reps[2:4].numpy(), reps.numpy()[2:4])
    natural = engine.encode(CLIP, clip=True)
    close(natural.numpy().reshape(1, 48, 66), "natural_clip_encoder_out")
    found = engine.predict(natural, **CANDIDATES)
    close(found.numpy().reshape(6, 48, 66), "clip_mpc_predicted")


@pytest.mark.parametrize("as_array", [False, True])
def test_rollout(engine, context, as_array):
    """From a handle, and from its numbers."""
    start = context.numpy() if as_array else context
    found = engine.rollout(start, ARRAYS["rollout_actions"], POSES[0])
    close(found.latents, "rollout_reps", 1e-4)
    close(found.states, "rollout_poses", 1e-5)
    alone = engine.rollout(start, ARRAYS["rollout_actions"][1], POSES[0])
    assert alone.latents.shape == (4, 16, 66)
    np.testing.assert_allclose(alone.latents, ARRAYS["rollout_reps"][1], atol=1e-4)


@pytest.mark.parametrize("name", SEARCHES)
def test_plan(engine, context, goal, name):
    plan = engine.plan(context, goal, POSES[0], latents=True, **SEARCHES[name])
    close(plan.actions, f"cem_{name}/plan", 1e-5)
    close(np.stack(plan.costs), f"cem_{name}/sample_costs", 1e-5)
    imagined = engine.rollout(context, plan.actions, POSES[0])
    np.testing.assert_allclose(plan.latents, imagined.latents, atol=1e-5)
    np.testing.assert_allclose(plan.states, imagined.states, atol=1e-6)


def test_a_plan_may_lower_another_cost(engine, context, goal):
    asked = {**SEARCHES["notebook"], "cost": "l2"}
    plan = engine.plan(context, goal, POSES[0], **asked)
    request = {"video": CLIP[:1], "goal_hidden": goal, "states": POSES[0], "plan": True}
    assert np.array_equal(engine.act(**request, **asked), plan.actions)
    first = Cem(**{n: asked[n] for n in ("samples", "horizon", "maxnorm")})
    actions = first.candidates(*first.start(torch.device("cpu")), torch.tensor(asked["noise"][0]))
    found = engine.rollout(context, actions.numpy(), POSES[0]).latents.numpy()[:, -1]
    expected = ((found - goal.numpy()[0]) ** 2).mean((1, 2))
    np.testing.assert_allclose(plan.costs[0], expected, atol=1e-5)


def test_a_plan_does_not_depend_on_how_its_samples_are_batched(engine, context, goal, monkeypatch):
    monkeypatch.setattr(engine.model.world, "size", lambda frames, cached: 7)
    plan = engine.plan(context, goal, POSES[0], **SEARCHES["notebook"])
    close(plan.actions, "cem_notebook/plan", 1e-5)


def test_the_same_seed_makes_the_same_plan(engine):
    """From pictures, and a context of three frames."""
    plans = [
        engine.plan(
            CLIP[:3],
            Image.fromarray(CLIP[5]),
            POSES[:3],
            actions=MOVES[:2],
            seed=seed,
            samples=12,
            topk=4,
            iterations=2,
        ).actions
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(plans[0], plans[1])
    assert not np.array_equal(plans[0], plans[2])


@pytest.fixture
def captured(engine, monkeypatch):
    """As on a GPU: steps of the engine are captured, by what stands for a GPU's graphs."""
    steps = CapturedSteps(replays, torch.device("cpu"))
    monkeypatch.setattr(engine.model.world, "captured", steps)
    return steps


def test_captured_rollouts_and_plans_are_those_of_single_steps(engine, captured):
    """Replayed with other numbers than they were captured with."""
    for frame in (3, 0):
        start = engine.encode(CLIP[frame])
        engine.rollout(start, ARRAYS["rollout_actions"] * (1 if frame == 0 else 0.5), POSES[frame])
    found = engine.rollout(start, ARRAYS["rollout_actions"], POSES[0]).latents
    close(found, "rollout_reps", 1e-4)
    goal = engine.encode(CLIP[5])
    for name in SEARCHES:
        plan = engine.plan(start, goal, POSES[0], **SEARCHES[name])
        close(plan.actions, f"cem_{name}/plan", 1e-5)
        close(np.stack(plan.costs), f"cem_{name}/sample_costs", 1e-5)
    assert len(captured) == 4  # to encode, to roll out, and two sizes of plan
    plan = engine.plan(start, goal, POSES[0], budget_ms=50, samples=10**4, iterations=1, seed=0)
    assert len(plan.costs) <= 1
    assert len(captured) < 20


def test_captured_plans_from_several_frames_are_those_of_single_steps(engine, monkeypatch):
    """What all samples saw before is one of the inputs of what is captured."""
    quick = {"samples": 6, "topk": 3, "iterations": 2, "horizon": 3, "seed": 1}
    asked = (CLIP[:3], CLIP[5], POSES[:3])
    plain = engine.plan(*asked, actions=MOVES[:2], **quick)
    steps = CapturedSteps(replays, torch.device("cpu"))
    monkeypatch.setattr(engine.model.world, "captured", steps)
    engine.plan(CLIP[1:4], CLIP[5], POSES[1:4], actions=MOVES[1:3], **quick)
    found = engine.plan(*asked, actions=MOVES[:2], **quick)
    np.testing.assert_allclose(np.stack(found.costs), np.stack(plain.costs), atol=1e-6)
    np.testing.assert_allclose(found.actions, plain.actions, atol=1e-6)


def test_nothing_is_captured_within_a_budget():
    """Warming up captures what plans of the usual size take, a policy what those of its own do."""
    with Engine("vjepa2_ac-tiny", dtype=torch.bfloat16, cpu_threads=1) as engine:
        captured = CapturedSteps(replays, torch.device("cpu"))
        engine.model.world.captured = captured
        engine.warmup()
        assert len(captured) == 2 + 10  # to encode; 1, 2, 4 ... 256 and all 400 candidates
        policy = engine.policy({"horizon": 3, "samples": 20})
        count = len(captured)
        for goal in (CLIP[5], engine.encode(CLIP[5]).numpy()):
            engine.plan(CLIP[0], goal, POSES[0], budget_ms=500, iterations=3, seed=0)
        seen = {"image": CLIP[0], "state": POSES[0], "goal": CLIP[5]}
        policy.infer(seen, deadline_ms=10**5)
        assert len(captured) == count


def test_every_batch_that_a_search_may_take_has_its_shape(engine, monkeypatch):
    world = engine.model.world
    monkeypatch.setattr(world, "captured", CapturedSteps(replays, torch.device("cpu")))
    monkeypatch.setattr(world, "size", lambda frames, cached: 12)
    calls = list(world.shapes(Search(Cem(samples=19, horizon=3))))
    assert [len(call.actions) for call in calls] == [1, 2, 4, 7, 8, 12]
    assert {call.actions.shape[1] for call in calls} == {3}


def test_a_budget_gives_the_best_plan_so_far(engine, context, goal, monkeypatch):
    """The clock allows 10 + 15 candidates, then 10 + 2: the last iteration is cut short."""
    allowed = iter([10, 15, 10, 2, 0])
    budget = "mstar.models.vjepa2.cem.Budget.fits"
    monkeypatch.setattr(budget, lambda self, count: min(count, next(allowed)))
    asked = {**SEARCHES["notebook"], "topk": 6}
    plan = engine.plan(context, goal, POSES[0], budget_ms=1e6, **asked)
    assert [len(costs) for costs in plan.costs] == [25, 12]
    monkeypatch.undo()
    asked |= {"noise": asked["noise"][:1], "iterations": 1}
    one = engine.plan(context, goal, POSES[0], **asked)
    np.testing.assert_allclose(plan.costs[0], one.costs[0], atol=1e-6)
    assert not np.array_equal(plan.actions, one.actions)


@pytest.mark.parametrize(("allowed", "places"), [((25, 11, 0), 6), ((8, 0), 4), ((3, 0), 0)])
def test_too_few_candidates_do_not_move_a_plan_by_chance(
    engine, context, goal, monkeypatch, allowed, places
):
    """Two have to compete for each place of the best: an iteration that was cut short is left out,
    but for a first one, of which fewer make the plan."""
    clock = iter(allowed)
    budget = "mstar.models.vjepa2.cem.Budget.fits"
    monkeypatch.setattr(budget, lambda self, count: min(count, next(clock)))
    asked = {**SEARCHES["notebook"], "topk": 6}
    plan = engine.plan(context, goal, POSES[0], budget_ms=1e6, **asked)
    monkeypatch.undo()
    asked["noise"] = asked["noise"][:1, :, : allowed[0]]
    asked |= {"samples": allowed[0], "iterations": 1, "topk": places or 2}
    one = engine.plan(context, goal, POSES[0], **asked)
    assert len(plan.costs) == (places > 0)
    expected = one.actions if places else np.zeros((2, 7))
    np.testing.assert_allclose(plan.actions, expected, atol=1e-6)


def test_a_budget_is_reckoned_with_something_to_spare(monkeypatch):
    """10 candidates take 4 s, of which 3 are for any batch: of 20 s, 4 are kept for the end."""
    now = 0.0
    monkeypatch.setattr("mstar.models.vjepa2.cem.time.monotonic", lambda: now)
    clock, scored = Budget(20.0, first=10), []
    while count := clock.fits(1000):
        now += 3 + 0.1 * count
        clock.took(count, torch.device("cpu"))
        scored.append(count)
    assert scored[0] == 10
    assert sum(scored) > 30
    assert now < 20


def test_a_budget_that_is_over_at_once_moves_nothing(engine, context, goal):
    plan = engine.plan(context, goal, POSES[0], budget_ms=1e-6)
    assert plan.costs == []
    assert not plan.actions.any()


def test_a_model_without_planning_says_who_has_it():
    with Engine("orpheus-tiny", cpu_threads=1) as other:
        for call in (lambda: other.plan(1, 2, 3), lambda: other.encode(1)):
            with pytest.raises(InvalidRequest, match="vjepa2_ac have"):
                call()


def test_the_last_of_several_images_is_the_goal(engine):
    """A moving picture and an image of the goal, as the command line sends them."""
    out = io.BytesIO()
    pictures = [Image.fromarray(frame) for frame in CLIP[:3]]
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:])
    asked = {"states": POSES[0], "energy": 2}
    result = engine.generate(images=[out.getvalue(), png(CLIP[5])], **asked)
    other = engine.generate(images=[out.getvalue()], goal_image=CLIP[5], **asked)
    np.testing.assert_array_equal(result.latents[0], other.latents[0])


# -- bad input ---------------------------------------------------------------------------------

ROLLOUT = {"video": CLIP[:1], "rollout_horizon": 3, "states": POSES[0]}
BAD = {
    "width": ("actions", {"actions": MOVES[:3, :6], "states": POSES[:3]}),
    "rows": ("actions", {"actions": MOVES[:2], "states": POSES[:2]}),
    "states rows": ("states", {"actions": MOVES[:3], "states": POSES[:2]}),
    "nan": ("states", {"actions": MOVES[:3], "states": POSES[:3] * np.nan}),
    "no states": ("states", {"actions": MOVES[:3]}),
    "no actions": ("actions", {"states": POSES[:3]}),
    "clip": ("actions", {"actions": MOVES[:3], "states": POSES[:3], "clip": "frames"}),
    "frames": ("num_frames", {"num_frames": 7, "skip_predictor": True}),
    "few": ("actions", {**ROLLOUT, "actions": MOVES[:2]}),
    "far": ("rollout_horizon", {**ROLLOUT, "rollout_horizon": 9, "actions": np.zeros((9, 7))}),
    "context": ("video", {**ROLLOUT, "context_frames": 2, "actions": MOVES[:4]}),
    "past": (
        "actions",
        {
            **ROLLOUT,
            "video": CLIP,
            "context_frames": 2,
            "states": POSES[:2],
            "actions": ARRAYS["rollout_actions"],
        },
    ),
    "candidates": (
        "states",
        {**ROLLOUT, "actions": ARRAYS["rollout_actions"], "states": np.zeros((3, 3, 7))},
    ),
    "extrinsics": ("extrinsics", {**ROLLOUT, "actions": MOVES, "extrinsics": np.zeros((3, 6))}),
    "no goal": ("goal_image", {**CANDIDATES, "mpc": True}),
    "two goals": (
        "goal_hidden_fill",
        {**CANDIDATES, "mpc": True, "goal_hidden_fill": 1.0, "goal_hidden": GOAL},
    ),
    "goal shape": ("goal_hidden", {**CANDIDATES, "mpc": True, "goal_hidden": GOAL[..., :65]}),
    "goal nan": ("goal_hidden", {**CANDIDATES, "mpc": True, "goal_hidden": GOAL * np.nan}),
    "goal path": ("goal_image", {**CANDIDATES, "mpc": True, "goal_image": "/etc/hostname"}),
    "goal pixels": ("goal_image", {**CANDIDATES, "mpc": True, "goal_image": [[0.5, 1], [2, 3]]}),
    "goal null": ("goal_image", {**CANDIDATES, "mpc": True, "goal_image": [None]}),
    "goal ragged": ("goal_image", {**CANDIDATES, "mpc": True, "goal_image": [[1], [2, 3]]}),
    "goal broken": ("goal_image", {**CANDIDATES, "mpc": True, "goal_image": b"nothing"}),
    "action": ("output_modalities", {**ROLLOUT, "output_modalities": ("action",)}),
    "action of a pass": (
        "output_modalities",
        {"actions": MOVES[:3], "states": POSES[:3], "output_modalities": ("action",)},
    ),
    "energy": ("energy", {"energy": 1, "states": POSES[0], "goal_hidden": GOAL}),
    "no action": ("output_modalities", {"plan": True, "states": POSES[0], "goal_hidden": GOAL}),
    "aimless": (
        "goal_image",
        {"actions": MOVES[:3], "states": POSES[:3], "goal_image": CLIP[5]},
    ),
    "image beside": (
        "images",
        {"actions": MOVES[:3], "states": POSES[:3], "images": [CLIP[5]]},
    ),
    "repeat": (
        "action_repeat",
        {"energy": 3, "states": POSES[0], "goal_image": CLIP[5], "action_repeat": 10**12},
    ),
    "broken": ("video", {"video": b"nothing", "skip_predictor": True}),
    "empty": ("video", {"video": CLIP[:0], "skip_predictor": True}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_by_name(engine, case):
    field, change = BAD[case]
    with pytest.raises(InvalidRequest) as caught:
        engine.generate(**{"video": CLIP, **change})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("horizon", {"horizon": 9}),
        ("horizon", {"horizon": 10**12}),
        ("samples", {"samples": 10**11}),
        ("axis", {"axis": {"x": 0.1}}),
        ("topk", {"samples": 5}),
        ("noise", {"noise": np.zeros((1, 2, 3, 4))}),
        ("state", {"state": POSES[0, :6]}),
        ("goal", {"goal": None}),
        ("context", {"context": np.zeros((1, 15, 66), np.float32)}),
        ("context", {"context": np.zeros((2, 1, 16, 66), np.float32)}),
        ("sample", {"sample": 3}),
    ],
)
def test_bad_plans_are_refused_by_name(engine, context, goal, field, change):
    given = {"context": context, "goal": goal, "state": POSES[0], **change}
    with pytest.raises(InvalidRequest) as caught:
        engine.plan(**given)
    assert caught.value.field == field


def test_a_context_of_several_frames_says_what_it_needs(engine, goal):
    with pytest.raises(InvalidRequest, match=r"actions.*1 rows.*must be 2, those between the 3"):
        engine.plan(CLIP[:3], goal, POSES[:3], actions=MOVES[:1])


@pytest.mark.parametrize("count", [0, -1, "a", 7])
def test_a_number_of_frames_that_makes_no_sense_is_refused(engine, count):
    with pytest.raises(InvalidRequest, match="num_frames"):
        engine.encode(CLIP, num_frames=count)


def test_a_film_is_not_decoded_to_the_end(engine):
    film = np.broadcast_to(CLIP[:1], (1025, *CLIP.shape[1:]))
    with pytest.raises(InvalidRequest, match="1025 frames of at most 1024"):
        engine.encode(film)


def test_a_rollout_beyond_the_model_is_refused(engine, context):
    with pytest.raises(InvalidRequest, match="the model knows 8"):
        engine.rollout(context, np.zeros((9, 7)), POSES[0])
    assert engine.rollout(context, np.zeros((8, 7)), POSES[0]).latents.shape == (8, 16, 66)


def test_a_cancelled_plan_leaves_the_engine_as_it_was(engine):
    handle = engine.submit(
        video=CLIP,
        goal_image=CLIP[5],
        states=POSES[0],
        plan=True,
        iterations=10**6,
        output_modalities=("action",),
    )
    handle.cancel()
    with pytest.raises(RequestCancelled):
        handle.result(10)
    assert engine.stats()["requests"]["running"] == 0
    with ThreadPoolExecutor(2) as pool:
        plans = [
            pool.submit(engine.plan, CLIP[:1], CLIP[5], POSES[0], **SEARCHES["axis_close"])
            for _ in range(2)
        ]
        for plan in plans:
            close(plan.result().actions, "cem_axis_close/plan", 1e-5)


def test_half_precision_is_near():
    with Engine("vjepa2_ac-tiny", dtype=torch.bfloat16, cpu_threads=1) as half:
        found = half.rollout(CLIP[:1], ARRAYS["rollout_actions"], POSES[0]).latents.numpy()
    golden = ARRAYS["rollout_reps"]
    cosine = (found * golden).sum() / np.linalg.norm(found) / np.linalg.norm(golden)
    assert cosine > 0.999


@pytest.mark.gpu
def test_on_a_gpu_captured_steps_are_near_the_goldens():
    with Engine("vjepa2_ac-tiny", device="cuda", dtype="float32") as gpu:
        for _ in range(2):  # captured, then replayed
            found = gpu.rollout(CLIP[:1], ARRAYS["rollout_actions"], POSES[0]).latents
            close(found, "rollout_reps", 1e-3)
            plan = gpu.plan(CLIP[:1], CLIP[5], POSES[0], **SEARCHES["notebook"])
            np.testing.assert_allclose(
                plan.costs[0], ARRAYS["cem_notebook/sample_costs"][0], atol=1e-3
            )


def test_dummy_weights_need_no_file(tmp_path):
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    with Engine("vjepa2_ac", weights=tmp_path, load_format="dummy", cpu_threads=1) as dummy:
        assert dummy.encode(CLIP).shape == (6, 16, 66)
