"""Results of the published implementations, on the tiny checkpoint, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mstar.models.control.action_queue import ActionQueue
from mstar.models.pi05.prompt import state_bins
from mstar.models.pi05.rtc import guided, trained

STEPS = 10


@pytest.fixture(scope="module")
def pair(goldens, plain):
    """What the padded computation makes of the pair, up to the prefix."""
    inputs = (goldens[f"pair.{n}"] for n in ("images", "image_masks", "tokens", "token_mask"))
    with torch.inference_mode():
        tokens, valid = plain.embed(*inputs)
        out, kv = plain.prefix(tokens, valid)
    return tokens, valid, out, kv


def prepared(goldens, processor, case, row):
    missing = tuple(goldens.facts[case].get("missing_cameras", ()))
    return processor.prepare(**goldens.observation(goldens.facts[case]["rows"][row], missing))


def sample(policy, observation, noise, steps=STEPS, steered=None):
    ids, images = observation.ids, observation.images
    return policy.sample(images, ids, noise, policy.table(steps), steered=steered)


# -- what goes in --------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 1])
def test_observations_are_prepared_as_published(row, goldens, processor):
    facts = goldens.facts["pair"]
    found = prepared(goldens, processor, "pair", row)
    there = goldens["pair.image_masks"][row].bool()
    torch.testing.assert_close(found.images, goldens["pair.images"][row][there], atol=2e-5, rtol=0)
    assert goldens["pair.images"][row][~there].eq(-1).all()
    count = int(goldens["pair.token_mask"][row].sum())
    assert count == facts["token_counts"][row]
    assert found.ids.equal(goldens["pair.tokens"][row][:count])
    np.testing.assert_allclose(found.normalised, goldens["pair.state_norm"][row], atol=1e-6)
    assert state_bins(found.normalised).tolist() == goldens["pair.state_bins"][row].tolist()


@pytest.mark.parametrize("row", [0, 1])
def test_all_three_images_are_prepared_as_published(row, goldens, processor):
    found = processor.prepare(**goldens.observation(row))
    expected = goldens["per_sample_mask.images"][row]
    torch.testing.assert_close(found.images, expected, atol=2e-5, rtol=0)
    if row == 1:
        assert found.ids.equal(goldens["single_full.tokens"][0][: len(found.ids)])


# -- stages --------------------------------------------------------------------------------------


def test_vision(goldens, whole):
    found = whole.trunk.vision(goldens["pair.images"][:, 0])
    goldens.check("pair.vision_last_hidden_cam0", found, 2e-5)


def test_the_prefix_as_published(goldens, pair):
    tokens, valid, out, kv = pair
    assert valid.equal(goldens["pair.prefix_pad_mask"].bool())
    positions = valid.long().cumsum(1) - 1
    assert positions.equal(goldens["pair.prefix_position_ids"])
    for name, found, near in (("embs", tokens, 2e-5), ("out", out, 5e-5)):
        expected = goldens[f"pair.prefix_{name}"]
        torch.testing.assert_close(found[valid], expected[valid], atol=near, rtol=0)
    for name, layer in (("kv0", kv[0]), ("kv_last", kv[-1])):
        for part, found in zip("kv", layer, strict=True):
            expected = goldens[f"pair.{name}.{part}"].transpose(1, 2)[valid]
            torch.testing.assert_close(found.transpose(1, 2)[valid], expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("row", [0, 1])
def test_the_packed_and_trimmed_prefix_has_the_published_keys_and_values(row, goldens, policy):
    valid = goldens["pair.prefix_pad_mask"][row].bool()
    tokens = goldens["pair.prefix_embs"][row][valid].unsqueeze(0)
    kv = policy.prefix(tokens)
    for name, layer in (("kv0", 0), ("kv_last", -1)):
        for part, found in zip("kv", kv.layers[layer], strict=True):
            expected = goldens[f"pair.{name}.{part}"][row, :, valid].transpose(0, 1)
            torch.testing.assert_close(found[0, : len(expected)], expected, atol=5e-5, rtol=0)


def test_time(goldens, policy):
    heads = policy.heads
    one = torch.ones(2)
    goldens.check("pair.time_emb_t1", heads.embed_time(one), 2e-5)
    goldens.check("pair.adarms_cond_t1", heads.condition(one), 2e-5)
    goldens.check("adarms_cond_table", heads.condition(goldens["flow_times"]), 2e-5)
    goldens.check("pair.suffix_embs_t1", heads.tokens(goldens["pair.noise"]), 2e-5)


def test_velocities_and_steps(goldens, plain, pair):
    _, valid, _, kv = pair
    velocity = plain.velocity(kv, valid, STEPS)
    goldens.check("pair.v_t1", velocity(goldens["pair.noise"], 0))
    steps = goldens["pair.x_steps"]
    mid = goldens.facts["pair"]["v_mid"]["step"]
    goldens.check("pair.v_mid", velocity(steps[:, mid], mid))
    x = [goldens["pair.noise"]]
    for step in range(STEPS):
        x.append(x[-1] - velocity(x[-1], step) / STEPS)
    goldens.check("pair.x_steps", torch.stack(x, 1))


# -- whole calls, on the fast path ---------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 1])
def test_a_camera_is_missing(row, goldens, policy, processor):
    observation = prepared(goldens, processor, "pair", row)
    found = sample(policy, observation, goldens["pair.noise"][row])
    dims = goldens["pair.actions_norm"].shape[-1]
    torch.testing.assert_close(
        found[:, :dims], goldens["pair.actions_norm"][row], atol=5e-5, rtol=0
    )
    actions = processor.finish(found.numpy(), observation.state)
    np.testing.assert_allclose(actions, goldens["pair.actions"][row], atol=5e-5)
    assert actions.dtype == np.float32


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_numbers_of_steps(steps, goldens, policy, processor):
    observation = prepared(goldens, processor, "single_full", 0)
    found = sample(policy, observation, goldens["pair.noise"][0], steps)[:, :7]
    goldens.check(f"single_full.actions_norm_steps{steps}", found.unsqueeze(0))


@pytest.mark.parametrize("row", [0, 1])
def test_another_camera_is_missing_in_every_sample(row, goldens, policy, processor):
    facts = goldens.facts["per_sample_mask"]
    whole = goldens.observation(row)
    there = facts["image_masks"][row]
    whole["images"] = {
        name: image for (name, image), on in zip(whole["images"].items(), there, strict=True) if on
    }
    found = sample(policy, processor.prepare(**whole), goldens["pair.noise"][row])[:, :7]
    expected = goldens["per_sample_mask.actions_norm"][row]
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


# -- real-time chunking --------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["LINEAR", "EXP", "ONES", "ZEROS"])
def test_guided(schedule, goldens, policy, processor):
    facts = goldens.facts["rtc"]
    observation = prepared(goldens, processor, "rtc", 0)
    chunk = guided(
        goldens["rtc.prev_chunk_left_over"],
        delay=facts["inference_delay"],
        horizon=10,
        actions=32,
        steps=STEPS,
        schedule=schedule,
        execution_horizon=facts["execution_horizon"],
        max_weight=facts["max_guidance_weight"],
    )
    tables = facts["schedules"][schedule]
    torch.testing.assert_close(chunk.weights, torch.tensor([tables["prefix_weights"]]))
    torch.testing.assert_close(
        chunk.gains, torch.tensor([tables["guidance_weights"]]), atol=0, rtol=1e-6
    )
    noise = goldens["pair.noise"][0]
    found = sample(policy, observation, noise, steered=chunk)
    goldens.check(f"rtc.{schedule}.actions_norm", found.unsqueeze(0), 2e-4)
    if f"rtc.{schedule}.x_steps" not in goldens:
        return
    seen = policy.encode_images(observation.images).flatten(0, 1)
    tokens = torch.cat([seen, policy.embed_text(observation.ids)])
    velocity = policy.velocity(policy.prefix(tokens.unsqueeze(0)), policy.table(STEPS))
    velocity = chunk.steer(velocity, STEPS)
    seen, x = [], noise.unsqueeze(0)
    for step in range(STEPS):
        v = velocity(x, step)
        seen.append((v, x))
        x = x - v / STEPS
    v, x = (torch.cat(each) for each in zip(*seen, strict=True))
    goldens.check(f"rtc.{schedule}.v_guided_steps", v, 2e-4)
    goldens.check(f"rtc.{schedule}.x_steps", x, 2e-4)


def test_trained(goldens, policy, processor):
    facts = goldens.facts["rtc_trained"]
    chunk = trained(
        goldens["rtc.prev_chunk_left_over"],
        delay=facts["inference_delay"],
        max_delay=facts["rtc_training_max_delay"],
        horizon=10,
        actions=32,
    )
    observation = prepared(goldens, processor, "rtc", 0)
    found = sample(policy, observation, goldens["pair.noise"][0], steered=chunk)
    goldens.check("rtc_trained.actions_norm", found.unsqueeze(0))


def test_select_action(goldens, policy, processor):
    observation = prepared(goldens, processor, "pair", 0)
    queue, seen = ActionQueue(rtc=False), []
    rows, dims = policy.config.n_action_steps, policy.config.action_dim
    while len(seen) < goldens.facts["select_action"]["calls"]:
        if not len(queue):
            chunk = sample(policy, observation, goldens["pair.noise"][0])[:rows, :dims].numpy()
            queue.merge(chunk, chunk)
        seen.append(torch.from_numpy(queue.get()))
    goldens.check("select_action.sequence_norm", torch.stack(seen))


def test_the_log_of_the_queue(goldens):
    def rows(start, count=6):
        return np.repeat(np.arange(start, start + count, dtype=np.float32)[:, None], 2, 1)

    def got():
        row = queue.get()
        return None if row is None else row.tolist()

    queue = ActionQueue()
    log = [["get", got()]]
    queue.merge(rows(0), rows(100), 0)
    log.append(["merge(o=0..5,p=100..105,delay=0)", len(queue)])
    log += [["get", got()], ["get", got()]]
    left = queue.left_over()[0][:, 0].tolist()
    log.append(["index,left_over[:,0]", [queue.index, left]])
    log.append(["get", got()])
    queue.merge(rows(10), rows(110), 1, index_before=2)
    left = queue.left_over()[0][:, 0].tolist()
    log.append(["merge(o=10..,p=110..,delay=1,index_before=2)", [len(queue), left]])
    queue.merge(rows(0), rows(100), 9)
    log.append(["merge(delay=9 > 6)", [len(queue), got() is None]])
    queue = ActionQueue(rtc=False)
    queue.merge(rows(0), rows(100), 3)
    got(), got()
    queue.merge(rows(10), rows(110), 3)
    log.append(["disabled: append, delay ignored", [len(queue), got()]])
    assert log == goldens.facts["action_queue"]
