"""V-JEPA 2's networks against stored outputs of the published code, and against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mstar.engine.weights import load, weight_bytes
from mstar.errors import WeightsError
from mstar.models.registry import get
from mstar.models.vjepa2.config import PUBLISHED, VJEPA2Config
from mstar.models.vjepa2.encoder import gathered
from mstar.models.vjepa2.layout import Published
from mstar.models.vjepa2.networks import VJEPA2, find_config, load_networks
from mstar.models.vjepa2.rotary import Rotation, grid_rotation, rotate

GOLDENS = load_file(Path(__file__).parents[2] / "data/vjepa2/goldens.safetensors")
TINY = get("vjepa2").tiny / "vjepa2"
TOLERANCE = 2e-5


def golden(name, case="tiny_vjepa2"):
    return GOLDENS[f"{case}/{name}"]


def close(found, name, case="tiny_vjepa2", atol=TOLERANCE):
    torch.testing.assert_close(found, golden(name, case), atol=atol, rtol=0)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def net():
    return load_networks(TINY, device="cpu", dtype=torch.float32)


# -- stored outputs ------------------------------------------------------------------------------


def test_encoder_step_by_step(net):
    pixels, encoder = golden("pixel_values"), net.encoder
    x = encoder.patch_embed(pixels, None)
    close(x, "patch_embed")
    block = encoder.blocks[0]
    q, _, _ = block.project(x, None)
    close(q, "layer0_q_before_rope")
    rotation = grid_rotation(torch.arange(64), 4, 4, 16)
    q, _, _ = block.project(x, rotation)
    close(q, "layer0_q_after_rope")
    close(block(x, rotation), "encoder_layer0_out")
    close(encoder(pixels), "encoder_out")


def test_encoder_on_other_clips(net):
    pixels = golden("pixel_values")
    close(net.encoder(golden("batch2_pixel_values")), "batch2_encoder_out")
    close(net.encoder(pixels[:, :1]), "single_frame_encoder_out")
    close(net.encoder.encode_static(pixels[:, 0]), "single_frame_encoder_out")
    close(net.encoder(pixels[:, [0, 0]]), "single_frame_encoder_out")
    close(net.encoder(pixels[:, :5]), "short_clip_encoder_out")
    close(net.encoder(pixels.repeat(1, 2, 1, 1, 1)[:, :12]), "long_clip_encoder_out")


def test_predictor(net):
    everything = torch.arange(64)[None]
    hidden = golden("encoder_out")
    close(net.predictor(hidden, everything, everything, 4, 4), "predictor_full")
    context, targets = golden("context_mask"), golden("target_mask")
    hidden = golden("batch2_encoder_out")
    seen = gathered(hidden, context)
    close(seen, "batch2_masked_hidden_state")
    close(gathered(hidden, targets), "batch2_target_hidden_state")
    close(net.predictor(seen, context, targets, 4, 4), "batch2_predictor_masked")
    alone = net.predictor(seen[1:], context[1:], targets[1:], 4, 4)
    torch.testing.assert_close(alone, golden("batch2_predictor_masked")[1:], atol=TOLERANCE, rtol=0)


def test_context_alone_is_encoded_as_in_training(net):
    context, targets = golden("context_mask"), golden("target_mask")
    seen = net.encoder(golden("batch2_pixel_values"), context)
    close(seen, "context_only_encoder_out")
    close(net.predictor(seen, context, targets, 4, 4), "context_only_predictor_out")


def test_classifier(net):
    tokens = golden("batch2_encoder_out")
    close(net.classifier.pooler(tokens), "pooled", "tiny_vjepa2_cls")
    close(net.classifier(tokens), "logits", "tiny_vjepa2_cls")


def test_bfloat16_is_as_close_as_the_published_code():
    net = load_networks(TINY, device="cpu", dtype=torch.bfloat16)
    found, expected = net.encoder(golden("pixel_values")).float(), golden("encoder_out")
    assert abs(found - expected).max() < 0.07
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.9995


# -- transformers --------------------------------------------------------------------------------


class Stored(dict):
    """A state dict as a checkpoint."""

    def shape(self, name):
        return self[name].shape

    def read(self, name):
        return self[name].clone()


# crop, patch, tubelet, frames, width, heads, mlp ratio, predictor's width and heads, mask tokens
CONFIGS = [
    (42, 14, 3, 7, 60, 3, 4.0, 44, 4, 1),  # 3 x 3, tubelets of 3, heads of 20 and 11
    (40, 8, 1, 3, 78, 3, 48 / 11, 80, 1, 2),  # 5 x 5, heads of 26 (13 frequencies don't pair)
    (34, 16, 2, 6, 80, 1, 3.3, 36, 2, 10),  # 2 x 2 with pixels left over, a head of 80
]


@pytest.mark.parametrize("sizes", CONFIGS, ids=str)
def test_random_configs_match_transformers(sizes):
    pytest.importorskip("transformers", "5.0")  # 4.57 fails on some of these sizes
    hub = pytest.importorskip("transformers.models.vjepa2")
    crop, patch, tubelet, frames, width, heads, ratio, pred_width, pred_heads, masks = sizes
    shape = {
        "crop_size": crop,
        "patch_size": patch,
        "tubelet_size": tubelet,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "mlp_ratio": ratio,
        "pred_hidden_size": pred_width,
        "pred_num_attention_heads": pred_heads,
        "pred_num_hidden_layers": 2,
        "pred_num_mask_tokens": masks,
        "num_pooler_layers": 1,
        "qkv_bias": masks > 1,
    }
    torch.manual_seed(crop)
    with torch.inference_mode(False):
        config = hub.VJEPA2Config(**shape, num_labels=5)
        theirs = hub.VJEPA2ForVideoClassification(config).eval()
        for parameter in theirs.parameters():
            parameter.data = torch.randn_like(parameter) * 0.15
    state = {name.removeprefix("vjepa2."): value for name, value in theirs.state_dict().items()}
    ours = VJEPA2(VJEPA2Config(**shape, labels=tuple("abcde")))
    for network in (ours.encoder, ours.predictor, ours.classifier):
        load(network, Stored(state), device="cpu", dtype=torch.float32)
    pixels = torch.randn(2, frames, 3, crop, crop)
    tokens = ours.encoder(pixels)
    count, grid = tokens.shape[1], crop // patch
    order = torch.stack([torch.randperm(count) for _ in range(2)])
    context, targets = order[:, : count // 2], order[:, count // 3 :] + count // 4
    expected = theirs.vjepa2(pixels, context_mask=[context], target_mask=[order[:, count // 3 :]])
    near = {"atol": 5e-5, "rtol": 1e-4}
    torch.testing.assert_close(tokens, expected.last_hidden_state, **near)
    seen = gathered(tokens, context)
    torch.testing.assert_close(
        ours.predictor(seen, context, order[:, count // 3 :], grid, grid),
        expected.predictor_output.last_hidden_state,
        **near,
    )
    future = theirs.vjepa2.predictor(tokens, [context], [targets]).last_hidden_state
    torch.testing.assert_close(ours.predictor(seen, context, targets, grid, grid), future, **near)
    torch.testing.assert_close(ours.classifier(tokens), theirs(pixels).logits, **near)


# -- parts ---------------------------------------------------------------------------------------


def test_position_zero_turns_nothing_and_tables_may_be_shared():
    x = torch.randn(2, 5, 3, 4, 21)
    ids = torch.tensor([0, 7, 3, 30, 8])
    shared = grid_rotation(ids, 2, 3, 21)
    assert torch.equal(rotate(x, shared)[:, 0], x[:, 0])
    apart = Rotation(*(table.expand(2, -1, -1) for table in shared))
    assert torch.equal(rotate(x, apart), rotate(x, shared))


def test_grids_that_are_not_square_have_their_own_positions(net):
    """The grid of the pixels at hand is used, not that of the crop."""
    wide = torch.randn(1, 2, 3, 16, 40)
    x = net.encoder.patch_embed(wide, None)
    rotation = grid_rotation(torch.arange(10), 2, 5, 16)
    for block in net.encoder.blocks:
        x = block(x, rotation)
    assert torch.equal(net.encoder(wide), net.encoder.norm(x))


# -- checkpoints ---------------------------------------------------------------------------------


def original(prefix):
    """The tiny checkpoint in the layout of the original files."""
    stored, files = load_file(TINY / "model.safetensors"), {"encoder": {}, "predictor": {}}
    head = {}
    names = {name.removeprefix("vjepa2."): value for name, value in stored.items()}
    with torch.device("meta"):
        net = VJEPA2(find_config(TINY))
    parts = {"encoder": net.encoder, "predictor": net.predictor, "": net.classifier}
    for part, network in parts.items():
        for name, _ in network.named_parameters():
            theirs = network.sources(name)[0].names
            value = torch.cat([names[each] for each in theirs])
            (files[part] if part else head)[prefix + name] = value.clone()
    tokens = files["predictor"].pop(prefix + "mask_tokens")
    files["predictor"] |= {f"{prefix}mask_tokens.{i}": t.clone() for i, t in enumerate(tokens)}
    files["encoder"][prefix + "pos_embed"] = torch.zeros(1, 4, 64)
    return files, head


@pytest.mark.parametrize("prefix", ["", "module.backbone.", "module."])
def test_original_files_hold_the_same(net, tmp_path, prefix):
    files, head = original(prefix)
    torch.save({**files, "opt": {"lr": 0.1}, "scaler": None, "epoch": 7}, tmp_path / "vit.pt")
    torch.save({"classifiers": [head]}, tmp_path / "probe.pt")
    config = (TINY / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    other = load_networks(tmp_path, device="cpu", dtype=torch.float32)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_missing_tensors_are_named(tmp_path):
    stored = load_file(TINY / "model.safetensors")
    del stored["vjepa2.encoder.layer.1.attention.key.bias"]
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"encoder\.layer\.1\.attention\.key\.bias"):
        load_networks(tmp_path, device="cpu", dtype=torch.float32)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    files, _ = original("")
    torch.save(files, tmp_path / "a.pt")
    torch.save(files, tmp_path / "b.pt")
    with pytest.raises(WeightsError, match=r"a\.pt and b\.pt"):
        Published(tmp_path)


@pytest.mark.parametrize(
    ("size", "encoder", "predictor"),
    [
        ("vitl", 303_885_312, 22_086_016),
        ("vith", 631_648_000, 22_282_880),
        ("vitg", 1_012_173_952, 22_381_312),
        ("vitg-384", 1_012_173_952, 22_381_312),
    ],
)
def test_published_sizes_have_as_many_parameters(size, encoder, predictor):
    with torch.device("meta"):
        net = VJEPA2(PUBLISHED[size])
    assert weight_bytes(net.encoder) == 4 * encoder
    assert weight_bytes(net.predictor) == 4 * predictor


def test_the_head_of_ssv2_has_as_many_parameters():
    labels = tuple(map(str, range(174)))
    with torch.device("meta"):
        net = VJEPA2(VJEPA2Config(labels=labels))
    assert weight_bytes(net.classifier.pooler) == 4 * 49_336_320
    assert weight_bytes(net.classifier.linear) == 4 * 178_350


def test_original_files_without_a_config_are_known_by_width_and_name(tmp_path):
    name = "module.backbone.patch_embed.proj.bias"
    torch.save({"encoder": {name: torch.zeros(1280)}}, tmp_path / "vith.pt")
    assert find_config(tmp_path) == PUBLISHED["vith"]
    (tmp_path / "vith.pt").unlink()
    torch.save({"encoder": {name: torch.zeros(1408)}}, tmp_path / "vitg-384.pt")
    assert find_config(tmp_path) == PUBLISHED["vitg-384"]
    torch.save({"encoder": {name: torch.zeros(99)}}, tmp_path / "vitg-384.pt")
    with pytest.raises(WeightsError, match="width 99"):
        find_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"num_attention_heads": 7}, "multiple of the 7 heads"),
        ({"hidden_act": "relu"}, "must be 'gelu'"),
        ({"crop_size": 4}, "must hold a patch"),
        ({"id2label": {"1": "b"}}, "must name the classes from 0 on"),
    ],
)
def test_configs_that_no_model_can_have(tmp_path, changes, said):
    config = json.loads((TINY / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=said):
        find_config(tmp_path)
