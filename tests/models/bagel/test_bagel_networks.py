"""Configs and weights: what is read, what is refused, and that random weights will do."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bagel_loop import TINY
from safetensors.torch import load_file, save_file

from mstar.errors import WeightsError
from mstar.models import bagel
from mstar.models.bagel.config import BagelConfig, LLMConfig, VAEConfig, ViTConfig
from mstar.models.bagel.networks import load_networks, networks

FULL = Path(bagel.__file__).parent / "full" / "bagel"
FILES = ("llm_config.json", "vit_config.json", "config.json")
TABLE = "latent_pos_embed.pos_embed"


@pytest.fixture
def folder(tmp_path):
    """Copies the tiny checkpoint, one of its configs changed; None leaves a field out."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)

    def change(file="config.json", **fields):
        path = tmp_path / file
        changed = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
        return tmp_path

    return change


def retensor(folder, file, **changes):
    """Change tensors of a file; None leaves one out."""
    tensors = {**load_file(folder / file), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / file)
    return folder


# -- configs -------------------------------------------------------------------------------------


def test_the_published_model_has_the_published_number_of_parameters():
    model, autoencoder = networks(FULL)
    assert sum(p.numel() for p in model.parameters()) == 14_607_260_128
    assert sum(p.numel() for p in autoencoder.encoder.parameters()) == 34_274_208
    assert sum(p.numel() for p in autoencoder.decoder.parameters()) == 49_545_475
    assert model.decoder.kv_layout.bytes_per_token(torch.bfloat16) == 57_344
    names = [
        n for name, _ in model.named_parameters() for s in model.sources(name) for n in s.names
    ]
    assert len(names) == len(set(names)) == 1223
    assert model.side == 64


def test_what_the_files_leave_out_is_as_published(folder):
    assert BagelConfig.from_folder(FULL) == BagelConfig()
    assert (BagelConfig().latent_downsample, BagelConfig().patch_latent_dim) == (16, 64)
    path = folder()
    (path / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"stride=14: must be a multiple of 8|max_num_patch"):
        networks(path)


def test_the_tiny_configs_are_read():
    config = BagelConfig.from_folder(TINY)
    assert config.llm.head_dim == 16
    assert (config.vit.layers, config.vit.patch_dim, config.vit.positions) == (3, 192, 144)
    assert (config.vae.ch_mult, config.vae.downsample) == ((1, 2, 1, 1), 8)
    assert (config.vae_rule.max_size, config.vit_rule.stride) == (128, 8)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("llm_config.json", {"hidden_act": "gelu"}, "hidden_act='gelu': must be 'silu'"),
        ("llm_config.json", {"qk_norm": False}, "qk_norm=False: must be True"),
        ("llm_config.json", {"tie_word_embeddings": True}, "tie_word_embeddings=True: must be Fa"),
        ("llm_config.json", {"rope_scaling": {"type": "yarn"}}, "rope_scaling="),
        ("llm_config.json", {"hidden_size": 60}, "hidden_size=60: must be a multiple of 8"),
        ("llm_config.json", {"num_key_value_heads": 3}, "num_key_value_heads=3: must divide"),
        ("llm_config.json", {"vocab_size": 0}, "vocab_size=0: must be an integer of at least 1"),
        ("llm_config.json", {"vocab_size": [7]}, r"vocab_size=\[7\]: must be an integer"),
        ("llm_config.json", {"rms_norm_eps": "x"}, "rms_norm_eps='x': must be a number above 0"),
        ("vit_config.json", {"model_type": "clip"}, "model_type='clip': must be 'siglip_vision"),
        ("vit_config.json", {"num_hidden_layers": 1}, "num_hidden_layers=1: must be 2 or more"),
        ("vit_config.json", {"num_channels": 1}, "num_channels=1: must be 3"),
        ("vit_config.json", {"num_attention_heads": 5}, "hidden_size=72: must be a multiple of"),
        ("config.json", {"connector_act": "relu"}, "connector_act='relu': must be 'gelu_pytorch"),
        ("config.json", {"interpolate_pos": True}, "interpolate_pos=True: must be False"),
        ("config.json", {"latent_patch_size": -1}, "latent_patch_size=-1: must be an integer"),
        ("config.json", {"latent_patch_size": 3}, "image_transforms.vae.stride=16: must be a mul"),
        (
            "config.json",
            {"vit_max_num_patch_per_side": 13},
            "vit_max_num_patch_per_side=13: the vis",
        ),
        (
            "config.json",
            {"vit_max_num_patch_per_side": 11},
            "image_transforms.vit.max_size=96: ther",
        ),
        ("config.json", {"vae_config": [1]}, r"vae_config=\[1\]: must be an object"),
        ("config.json", {"vae_config": {"ch": 40}}, "vae_config.ch=40: must be a multiple of 32"),
        (
            "config.json",
            {"vae_config": {"ch_mult": []}},
            r"vae_config.ch_mult=\[\]: must be a list",
        ),
        ("config.json", {"vae_config": {"downsample": 16}}, "vae_config.downsample=16: must be 8"),
        (
            "config.json",
            {"image_transforms": {"vae": {"max_size": 100}}},
            "image_transforms.vae.max_size=100: must be a multiple of 16",
        ),
    ],
)
def test_values_that_no_network_has_are_refused_by_name(folder, file, change, says):
    where = "" if file == "config.json" else f"{file}: "
    with pytest.raises(WeightsError, match=f"cannot use the configs in .*: {where}{says}"):
        networks(folder(file, **change))


@pytest.mark.parametrize("kind", [LLMConfig, ViTConfig, VAEConfig])
def test_no_value_of_any_field_gives_another_error(kind):
    for name in kind.__dataclass_fields__:
        for value in ("x", "", 0, -1, 1, 3, 0.5, True, [], [0], {}, ["x"], float("nan")):
            with contextlib.suppress(ValueError):
                kind.from_dict({name: value})


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("content", "says"), [(b"{", "it is not JSON"), (b"[]", "it must hold an object, not a list")]
)
def test_files_that_are_no_configs_are_refused(folder, file, content, says):
    path = folder()
    (path / file).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{file}: {says}"):
        networks(path)


# -- weights -------------------------------------------------------------------------------------


def test_every_published_tensor_is_read(loop):
    for module, file in ((loop.bagel, "ema.safetensors"), (loop.autoencoder, "ae.safetensors")):
        stored = load_file(TINY / file)
        wanted = set()
        for name, parameter in module.named_parameters():
            sources = module.sources(name) if hasattr(module, "sources") else None
            parts = sources[0].names if sources else (name,)
            wanted.update(parts)
            found = torch.cat([stored[part] for part in parts]).float()
            assert torch.equal(parameter, found), name
        assert wanted == set(stored)


def test_the_size_of_the_position_table_is_that_of_the_file(folder):
    path = folder(max_latent_size=3)
    assert networks(path)[0].side == 8
    (path / "ema.safetensors").unlink()
    assert networks(path)[0].side == 8  # for the largest image


@pytest.mark.parametrize(
    ("rows", "says"),
    [(None, "lacks latent_pos"), (60, "has 60 rows, and they must be a square"), (49, "7 x 7")],
)
def test_another_position_table_is_refused(folder, rows, says):
    path = retensor(folder(), "ema.safetensors", **{TABLE: rows and torch.zeros(rows, 64)})
    with pytest.raises(WeightsError, match=says):
        networks(path)


def test_missing_and_misshapen_tensors_are_named_and_others_ignored(folder):
    layer = "language_model.model.layers.1."
    path = retensor(
        folder(),
        "ema.safetensors",
        **{
            f"{layer}self_attn.k_proj_moe_gen.weight": None,
            f"{layer}mlp_moe_gen.down_proj.weight": torch.zeros(64, 161),
            "something.else": torch.zeros(3),
        },
    )
    with pytest.raises(WeightsError, match="does not fit Bagel") as raised:
        load_networks(path, device="cpu", dtype=torch.float32)
    assert f"{layer}self_attn.k_proj_moe_gen.weight: missing" in str(raised.value)
    assert f"{layer}mlp_moe_gen.down_proj.weight: found [64, 161]" in str(raised.value)
    assert "something.else" not in str(raised.value)


@pytest.mark.parametrize("file", ["ema.safetensors", "ae.safetensors", *FILES[:2]])
def test_missing_files_are_named(folder, file):
    path, told = folder(), []
    (path / file).unlink()
    how = {"device": "cpu", "dtype": torch.float32, "progress": lambda *so_far: told.append(so_far)}
    with pytest.raises(WeightsError, match=f"there is no .*{file}"):
        load_networks(path, **how)
    assert not told or file == "ema.safetensors"  # whose 29 GB are read last


def test_an_index_beside_the_weights_is_not_read(folder):
    path = folder()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_networks(path, device="cpu", dtype=torch.float32)


def test_weights_may_be_stored_in_any_precision(folder, loop):
    path = folder()
    for file in ("ema.safetensors", "ae.safetensors"):
        tensors = load_file(path / file)
        save_file({name: t.to(torch.float64) for name, t in tensors.items()}, path / file)
    model, autoencoder = load_networks(path, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in autoencoder.parameters()} == {torch.float32}
    ours = autoencoder.decoder.conv_in.weight
    assert torch.equal(ours, loop.autoencoder.decoder.conv_in.weight)


def test_random_weights_need_no_files_and_give_finite_numbers(folder):
    path = folder()
    for file in ("ema.safetensors", "ae.safetensors"):
        (path / file).unlink()
    model, autoencoder = load_networks(path, device="cpu", dtype=torch.float32, dummy=True)
    tokens = model.latent_tokens(torch.randn(12, 64), 0.5, 3, 4)
    velocity = model.velocity(model.decoder(tokens, torch.zeros(12), None, 12))
    pixels = autoencoder.decode(torch.randn(1, 16, 6, 8))
    assert velocity.isfinite().all()
    assert pixels.shape == (1, 3, 48, 64)
    assert pixels.isfinite().all()


def test_parts_that_do_not_fit_each_other_are_refused():
    config = BagelConfig()
    with pytest.raises(ValueError, match="vit_max_num_patch_per_side=71"):
        replace(config, vit_max_num_patch_per_side=71)
