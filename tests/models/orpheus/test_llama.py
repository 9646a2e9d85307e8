from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import mstar.models.orpheus
from mstar.engine.checkpoint import Checkpoint
from mstar.engine.kvcache import KVPool
from mstar.engine.lm import LanguageModel
from mstar.engine.runtime import Runtime
from mstar.engine.sampling import SamplingParams
from mstar.engine.traps import gather
from mstar.engine.weights import load
from mstar.models.orpheus.llama import Llama, LlamaConfig
from mstar.types import Usage

TINY = Path(mstar.models.orpheus.__file__).parent / "tiny" / "lm"
DATA = Path(__file__).parents[2] / "data" / "orpheus"
STOP = 128258


@pytest.fixture(scope="module", autouse=True)
def inference():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are so small that a second one only gets in the way
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "goldens.safetensors")


@pytest.fixture(scope="module")
def tiny():
    with torch.device("meta"):
        llama = Llama(LlamaConfig.from_file(TINY / "config.json"))
    return load(llama, Checkpoint.open(TINY), device="cpu", dtype=torch.float32)


# -- the reference goldens -----------------------------------------------------------------------


def test_the_rotary_table_is_that_of_the_reference(tiny, golden):
    torch.testing.assert_close(tiny.rotary.inv_freq, golden["rope_inv_freq"], rtol=1e-6, atol=0)
    cos, sin = tiny.rotary.angles(torch.arange(200))
    torch.testing.assert_close(cos, golden["rope_cos_pos0_199"], rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, golden["rope_sin_pos0_199"], rtol=0, atol=1e-6)


def test_hidden_states_are_those_of_the_reference(tiny, golden):
    layers = []
    hidden = tiny(golden["c0.prompt_ids"].long(), keep=layers)
    found = torch.stack([layers[0], layers[1], hidden])
    torch.testing.assert_close(found, golden["c0.hidden_states_prompt"], rtol=0, atol=5e-5)
    first = tiny.logits(hidden[-1:])[0, 128000:]
    torch.testing.assert_close(first, golden["c0.logits_from_128000_step0"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("case", range(6))
def test_logits_are_those_of_the_reference(case, tiny, golden):
    prompt, new = golden[f"c{case}.prompt_ids"], golden[f"c{case}.greedy"]
    hidden = tiny(torch.cat([prompt, new]).long())
    steps = golden[f"c{case}.logits_steps"].long()
    logits = tiny.logits(hidden[len(prompt) - 1 + steps])
    sampled = logits[:, golden["logit_sample_ids"].long()]
    torch.testing.assert_close(sampled, golden[f"c{case}.logits_sampled"], rtol=0, atol=2e-4)
    top = logits.gather(1, golden[f"c{case}.logits_top_ids"].long())
    torch.testing.assert_close(top, golden[f"c{case}.logits_top_vals"], rtol=0, atol=2e-4)


def speak(tiny, prompts, params, lm=None):
    """The tokens of all prompts, decoded together, and their usages."""
    lm = lm or LanguageModel("lm", tiny, KVPool(tiny.kv_layout, 4096))
    usages, found = [Usage() for _ in prompts], []

    async def one(prompt, usage):
        with lm.open_cache() as kv:
            return [token async for token in lm.generate(kv, prompt, params, usage=usage)]

    async def all_of_them():
        found.extend(await gather(*(one(p, u) for p, u in zip(prompts, usages, strict=True))))
        runtime.stop()

    runtime = Runtime()
    lm.bind(runtime.schedule)
    runtime.spawn(all_of_them())
    runtime.run()
    assert lm.pool.table.used == 0
    return found, usages


def prompts_of(golden):
    return [golden[f"c{case}.prompt_ids"].tolist() for case in range(6)]


def speech_of(golden):
    """The reference tokens without the stop token at their end."""
    return [golden[f"c{case}.greedy"].tolist()[:-1] for case in range(6)]


GREEDY = SamplingParams(temperature=0.0, stop_ids=frozenset([STOP]))


@pytest.mark.parametrize("case", [0, 2])
def test_greedy_tokens_alone_are_those_of_the_reference(case, tiny, golden):
    assert speak(tiny, [prompts_of(golden)[case]], GREEDY)[0] == [speech_of(golden)[case]]


def test_greedy_tokens_in_one_batch_and_with_a_warm_prefix_cache_are_those_of_the_reference(
    tiny, golden
):
    lm = LanguageModel("lm", tiny, KVPool(tiny.kv_layout, 4096, page_size=4), token_budget=16)
    found, usages = speak(tiny, prompts_of(golden), GREEDY, lm)
    assert found == speech_of(golden)
    assert all(usage.cached_tokens == 0 for usage in usages)
    found, usages = speak(tiny, prompts_of(golden), GREEDY, lm)
    assert found == speech_of(golden)
    assert all(usage.cached_tokens >= usage.prompt_tokens - 4 for usage in usages)


def test_greedy_tokens_with_repetition_penalty_are_those_of_the_reference(tiny, golden):
    params = SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=60)
    expected = [golden[f"c{case}.greedy_rp1.3_60"].tolist() for case in range(6)]
    assert speak(tiny, prompts_of(golden), params)[0] == expected


# -- live parity with transformers ---------------------------------------------------------------


SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


def theirs(scaling="default", **options):
    """A random Llama of transformers."""
    pytest.importorskip("transformers", "5.0")  # older ones name the rotary parameters otherwise
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 60,
            "max_position_embeddings": 128,
            "rope_parameters": {**SCALINGS[scaling], "rope_theta": 1000.0},
            "eos_token_id": None,
            "pad_token_id": 0,
            **options,
        }
    )
    torch.manual_seed(0)
    with torch.inference_mode(False):
        model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert parameter.isfinite().all(), name
    return model


def continued(reference, prompt, count):
    """The greedy tokens of transformers."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": count}
    return reference.generate(ids, attention_mask=torch.ones_like(ids), **options)[
        0, len(prompt) :
    ].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"scaling": "linear", "num_key_value_heads": 4},
        {"scaling": "llama3", "num_key_value_heads": 1, "tie_word_embeddings": True},
        {"scaling": "yarn", "attention_bias": True},
        {
            "mlp_bias": True,
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 16,
        },
        {"rms_norm_eps": 1e-2, "num_hidden_layers": 1, "head_dim": None},
    ],
    ids=lambda options: ", ".join(f"{k}={v}" for k, v in options.items()),
)
def test_logits_and_greedy_tokens_are_those_of_transformers(options, tmp_path):
    reference = theirs(**options)
    reference.save_pretrained(tmp_path)
    with torch.device("meta"):
        llama = Llama(LlamaConfig.from_file(tmp_path / "config.json"))
    load(llama, Checkpoint.open(tmp_path), device="cpu", dtype=torch.float32)
    ids = torch.randint(60, (1, 50))
    logits = llama.logits(llama(ids[0]))
    torch.testing.assert_close(logits, reference(ids).logits[0], rtol=0, atol=2e-4)
    prompts = [ids[0, :n].tolist() for n in (3, 20, 50)]
    expected = [continued(reference, prompt, 20) for prompt in prompts]
    lm = LanguageModel("lm", llama, KVPool(llama.kv_layout, 512), token_budget=16)
    params = SamplingParams(temperature=0.0, max_tokens=20)
    assert speak(llama, prompts, params, lm)[0] == expected


# -- the published config ------------------------------------------------------------------------


def test_configs_are_read_in_the_older_and_the_newer_form():
    published = json.loads((TINY / "config.json").read_text())
    old = LlamaConfig.from_dict(published)
    scaling = published.pop("rope_scaling")
    theta = published.pop("rope_theta")
    new = LlamaConfig.from_dict({**published, "rope_parameters": {**scaling, "rope_theta": theta}})
    assert old == new
    assert (old.rope_theta, old.rope_scaling["factor"], old.tie_word_embeddings) == (5e5, 32, True)


def test_a_config_gives_what_is_left_out():
    least = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": None,
        "vocab_size": 60,
    }
    config = LlamaConfig.from_dict(least)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 8, 10000.0)
    yarn = {"rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 64}
    assert (
        LlamaConfig.from_dict({**least, **yarn}).rope_scaling["original_max_position_embeddings"]
        == 64
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral': must be 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': must be 'silu'"),
    ],
)
def test_another_kind_of_network_is_refused(change, message):
    published = json.loads((TINY / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({**published, **change})
