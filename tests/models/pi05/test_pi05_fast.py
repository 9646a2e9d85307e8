"""The fast path against the padded one: packed, trimmed, tabulated, batched, in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from pi05_data import FULL, TINY

from mstar.engine.weights import randomize
from mstar.models.pi05.networks import Policy, load_policy, policy_config
from mstar.models.pi05.plain import PlainPolicy
from mstar.models.pi05.rtc import guided, trained
from mstar.models.pi05.sizes import GemmaSizes

STEPS = 3
SUBSETS = [c for count in (1, 2, 3) for c in combinations(range(3), count)]


@pytest.fixture(scope="module")
def table(policy):
    with torch.inference_mode():
        return policy.table(STEPS)


def given(config, seed=0, batch=1):
    """Images, ids and noise of observations."""
    dice = torch.Generator().manual_seed(seed)
    size = config.vision.image_size
    images = torch.rand(batch, 3, 3, *size, generator=dice) * 2 - 1
    ids = torch.randint(4, config.vocab_size, (batch, 200), generator=dice)
    shape = batch, config.chunk_size, config.max_action_dim
    return images, ids, torch.randn(shape, generator=dice)


def published(plain, images, ids, noise, cameras, length, steered=None):
    there = torch.zeros(1, 3, dtype=torch.bool)
    there[0, list(cameras)] = True
    mask = torch.arange(200).unsqueeze(0) < length
    return plain.sample(images, there, ids * mask, mask, noise, STEPS, steered)


@pytest.mark.parametrize("cameras", SUBSETS)
@pytest.mark.parametrize("length", [1, 37, 200])
def test_any_cameras_and_any_text(cameras, length, policy, plain, table):
    images, ids, noise = given(policy.config, seed=length)
    expected = published(plain, images, ids, noise, cameras, length)
    found = policy.sample(images[0, list(cameras)], ids[0, :length], noise[0], table)
    torch.testing.assert_close(found, expected[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 63, 64])
def test_text_padded_to_a_bucket(length, policy, table):
    images, ids, noise = given(policy.config)
    expected = policy.sample(images[0], ids[0, :length], noise[0], table)
    bucket = ids[0, :64]
    found = policy.sample(images[0], bucket, noise[0], table, length=torch.tensor([length]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_is_in_the_padding_changes_nothing(policy, table):
    images, ids, noise = given(policy.config)
    length = torch.tensor([20])
    one = policy.sample(images[0], ids[0, :64], noise[0], table, length=length)
    ids[0, 20:] = 0
    assert policy.sample(images[0], ids[0, :64], noise[0], table, length=length).equal(one)


def test_observations_of_several_lengths_in_one_batch(policy, table):
    images, ids, noise = given(policy.config, batch=3)
    counts = [(3, 50), (1, 200), (2, 7)]
    rows = [
        torch.cat([policy.encode_images(i[:c]).flatten(0, 1), policy.embed_text(t[:n])])
        for (c, n), i, t in zip(counts, images, ids, strict=True)
    ]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    kv = policy.prefix(tokens, torch.tensor([len(row) for row in rows]))
    together = policy.denoise(kv, noise, table)
    for (cameras, length), found, i, t, n in zip(counts, together, images, ids, noise, strict=True):
        alone = policy.sample(i[:cameras], t[:length], n, table)
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_the_same_observation_gives_the_same_bits(policy, table):
    images, ids, noise = given(policy.config, batch=2)
    first = policy.sample(images[0], ids[0, :50], noise[0], table)
    policy.sample(images[1, :1], ids[1, :90], noise[1], table)
    assert policy.sample(images[0], ids[0, :50], noise[0], table).equal(first)


@pytest.mark.parametrize("delay", [1, 4])
def test_a_hard_prefix_is_kept_and_equals_the_plain_one(delay, policy, plain, table):
    images, ids, noise = given(policy.config)
    previous = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
    chunk = trained(previous, delay=delay, max_delay=4, horizon=10, actions=32)
    expected = published(plain, images, ids, noise, (0, 1, 2), 30, chunk)[0]
    found = policy.sample(images[0], ids[0, :30], noise[0], table, steered=chunk)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert found[:delay, :7].equal(previous[:delay])
    assert found[:delay, 7:].eq(0).all()


def test_steering_towards_nothing_is_plain_sampling_to_the_bit(policy, table):
    images, ids, noise = given(policy.config)
    arguments = images[0], ids[0, :30], noise[0], table
    expected = policy.sample(*arguments)
    previous = torch.ones(6, 7)
    free = trained(previous, delay=0, max_delay=4, horizon=10, actions=32)
    assert policy.sample(*arguments, steered=free).equal(expected)
    free = guided(previous, delay=0, horizon=10, actions=32, steps=STEPS, schedule="ZEROS")
    assert policy.sample(*arguments, steered=free).equal(expected)


def test_several_key_heads(policy):
    sizes = GemmaSizes(64, 2, 96, 6, 2, 16)
    expert = replace(sizes, width=32, mlp_dim=48)
    config = replace(policy.config, prefix=sizes, expert=expert)
    whole, fast = Policy(config, whole=True), Policy(config)
    randomize(whole, device="cpu", dtype=torch.float32)
    for parameter in whole.parameters():
        parameter.normal_(0, 0.2)
    whole.eval()
    wanted = fast.state_dict()
    wanted.update(
        {name: x[-len(wanted[name]) :] for name, x in whole.state_dict().items() if name in wanted}
    )
    fast.load_state_dict(wanted)
    images, ids, noise = given(config)
    expected = published(PlainPolicy(whole), images, ids, noise, (0, 2), 30)
    for policy in (whole, fast):
        found = policy.sample(images[0, [0, 2]], ids[0, :30], noise[0], policy.table(STEPS))
        torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=1e-4)


def test_bfloat16_is_near_float32(goldens, processor):
    policy = load_policy(TINY, device="cpu", dtype=torch.bfloat16)
    assert policy.heads.modulation.weight.dtype == torch.float32
    named = policy.trunk.named_parameters()
    kinds = {name.rpartition(".")[0]: parameter.dtype for name, parameter in named}
    norms = {name for name, kind in kinds.items() if kind == torch.float32}
    assert norms == {name for name in kinds if "norm" in name}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}
    missing = ("observation.images.right_wrist_0_rgb",)
    off = []
    for row in (0, 1):
        found = processor.prepare(**goldens.observation(row, missing))
        noise = goldens["pair.noise"][row]
        chunk = policy.sample(found.images, found.ids, noise, policy.table(10))
        off.append(chunk[:, :7] - goldens["pair.actions_norm"][row])
    off = torch.stack(off)
    assert off.abs().max() < 0.06
    assert off.square().mean().sqrt() < 0.015


def test_the_published_size():
    with torch.device("meta"):
        whole, fast = (Policy(policy_config(FULL), whole=flag) for flag in (True, False))
    for policy, count in ((whole, 3_616_757_520 - 263_323_648), (fast, 3_244_377_872)):
        assert sum(p.numel() for p in policy.parameters()) == count
    names = [
        name
        for part in (whole.trunk, whole.heads)
        for parameter, _ in part.named_parameters()
        for source in part.sources(parameter)
        for name in source.names
    ]
    assert len(names) == len(set(names)) == 812 - 1  # the head of the expert is never read
