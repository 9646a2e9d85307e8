from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from mstar.engine.layers.rotary import Rotary, inverse_frequencies, rotate

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    "yarn with a factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "attention_factor": 1.25,
    },
}


def theirs(head_dim, theta, scaling):
    pytest.importorskip("transformers", "5.0")  # older ones name the parameters otherwise
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": theta},
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("kind", SCALINGS)
def test_angles_and_rotation_are_those_of_transformers(kind, theta, head_dim):
    reference = theirs(head_dim, theta, SCALINGS[kind])
    rotary = Rotary(head_dim, theta, SCALINGS[kind])
    torch.testing.assert_close(rotary.inv_freq, reference.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([0, 1, 2, 17, 300, 3000])
    x = torch.randn(6, 3, head_dim)
    cos, sin = reference(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    found = rotate(x, *rotary.angles(positions))
    torch.testing.assert_close(found, expected[0].transpose(0, 1), rtol=1e-4, atol=2e-4)


def test_the_base_may_be_given_with_the_scaling_under_the_old_name_or_the_new():
    new = inverse_frequencies(8, 1.0, {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0})
    old = inverse_frequencies(8, 500.0, {"type": "linear", "factor": 2.0})
    torch.testing.assert_close(new[0], old[0], rtol=0, atol=0)


def test_rotation_is_computed_in_float32_and_keeps_the_dtype():
    x = torch.randn(4, 2, 8, dtype=torch.bfloat16)
    cos, sin = Rotary(8, 1e4).angles(torch.arange(4))
    assert cos.dtype == torch.float32
    found = rotate(x, cos, sin)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, rotate(x.float(), cos, sin).bfloat16(), rtol=0, atol=0)


def test_frequencies_are_real_numbers_also_under_the_meta_device():
    with torch.device("meta"):
        rotary = Rotary(8, 1e4, SCALINGS["llama3"])
    assert rotary.inv_freq.device.type == "cpu"


def test_a_scaling_that_is_not_known_is_refused_by_name():
    with pytest.raises(ValueError, match="rope_type='longrope': must be one of default"):
        inverse_frequencies(8, 1e4, {"rope_type": "longrope"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"factor": None}, "factor is missing in the rotary scaling"),
        ({"factor": 0}, "factor=0 in the rotary scaling: must be a number above 0"),
        ({"factor": "8"}, "factor='8' in the rotary scaling: must be a number above 0"),
        ({"high_freq_factor": 1.0}, "high_freq_factor=1.0 .* must be a number above 1.0"),
        ({"original_max_position_embeddings": True}, "original_max_position_embeddings=True"),
        ({"rope_theta": 1}, "rope_theta=1 in the rotary scaling: must be a number above 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(change, says):
    with pytest.raises(ValueError, match=says):
        inverse_frequencies(8, 1e4, {**SCALINGS["llama3"], **change})


@pytest.mark.parametrize("key", ["factor", "beta_fast", "beta_slow", "attention_factor", "mscale"])
def test_the_numbers_of_yarn_are_checked_as_well(key):
    scaling = {**SCALINGS["yarn with mscale"], key: -1}
    with pytest.raises(ValueError, match=f"{key}=-1 in the rotary scaling"):
        inverse_frequencies(8, 1e4, scaling)
