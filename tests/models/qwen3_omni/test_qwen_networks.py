"""Configs and weights: what is read, what is refused, and that random weights will do."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from qwen_loop import FULL, TINY
from safetensors.torch import load_file, save_file
from torch import nn

from mstar.engine.kvcache import KVPool
from mstar.engine.lm import LanguageModel
from mstar.engine.sampling import SamplingParams
from mstar.engine.spans import Span
from mstar.errors import WeightsError
from mstar.models.qwen3_omni.networks import load_networks, networks


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def changed(tmp_path):
    """The tiny checkpoint with another value in its config; `None` leaves an entry out."""

    def change(path, value):
        shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
        raw = json.loads((TINY / "config.json").read_text())
        part, *rest = raw, *path.split(".")
        for name in rest[:-1]:
            part = part[name]
        part[rest[-1]] = value
        if value is None:
            del part[rest[-1]]
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return tmp_path

    return change


def test_the_published_model_has_the_published_number_of_parameters():
    found = networks(FULL)
    omni, talker = found.omni, found.omni.talker
    assert count(omni.thinker) == 30_532_646_912
    assert count(omni.audio) == 647_927_168
    assert count(omni.vision) == 538_631_408
    assert count(talker.code_predictor) == 141_570_304
    assert count(talker) - count(talker.code_predictor) == 3_183_026_176
    assert count(found.vocoder) == 216_016_577
    names = [n for k, _ in omni.named_parameters() for s in omni.sources(k) for n in s.names]
    names += [
        n
        for k, _ in found.vocoder.named_parameters()
        for s in found.vocoder.sources(k)
        for n in s.names
    ]
    assert len(names) == len(set(names)) == 28_010
    assert omni.thinker.kv_layout.bytes_per_token(torch.bfloat16) == 98_304
    assert talker.kv_layout.bytes_per_token(torch.bfloat16) == 20_480
    assert (found.vocoder.synthesis.tail, found.vocoder.synthesis.context) == (555, 10)


def test_sharded_checkpoints_are_read(tmp_path, goldens, loop):
    tensors = load_file(TINY / "model.safetensors")
    shutil.copy(TINY / "config.json", tmp_path)
    names = sorted(tensors)
    shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file)
    weight_map = {name: file for file, own in shards.items() for name in own}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    done = []
    found = load_networks(
        tmp_path, device="cpu", dtype=torch.float32, progress=lambda *args: done.append(args)
    )
    for own, other in ((found.omni, loop.omni), (found.vocoder, loop.vocoder)):
        for (name, a), (_, b) in zip(own.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(a, b), name
    assert len(done) == len([*found.omni.parameters(), *found.vocoder.parameters()])


def test_without_speech_nothing_of_it_is_needed(tmp_path):
    tensors = load_file(TINY / "model.safetensors")
    save_file(
        {name: t for name, t in tensors.items() if name.startswith("thinker.")},
        tmp_path / "model.safetensors",
    )
    raw = json.loads((TINY / "config.json").read_text())
    for config in (raw, {**raw, "enable_audio_output": False}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = load_networks(
            tmp_path, device="cpu", dtype=torch.float32, speech=not config["enable_audio_output"]
        )
        assert found.omni.talker is found.vocoder is None
        hidden = found.omni.thinker(found.omni.thinker.embed(torch.tensor([1, 2])))
        assert hidden.shape == (2, 64)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(WeightsError, match=r"talker\.model\.codec_embedding\.weight: missing"):
        load_networks(tmp_path, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model_type", "qwen2", "model_type='qwen2'"),
        ("thinker_config", None, "it has no thinker_config"),
        ("talker_config", [], "talker_config=[]: must be an object"),
        ("enable_audio_output", "yes", "must be true or false"),
        ("tts_pad_token_id", None, "it has no tts_pad_token_id"),
        ("user_token_id", 100_000, "user_token_id=100000: must be an id below"),
        ("thinker_config.audio_config.d_model", 30, "audio_config.d_model=30: must be a multiple"),
        (
            "thinker_config.audio_config.output_dim",
            32,
            "audio_config.output_dim=32: must be the 64",
        ),
        ("thinker_config.audio_config.n_window_infer", 150, "multiple of 100"),
        ("thinker_config.vision_config.hidden_act", "relu", "hidden_act='relu'"),
        ("thinker_config.vision_config.depth", None, "vision_config: it has no depth"),
        ("thinker_config.vision_config.num_position_embeddings", 65, "must be a square"),
        ("thinker_config.vision_config.deepstack_visual_indexes", [3, 9], "within the 5 layers"),
        ("thinker_config.text_config.num_experts_per_tok", 9, "there are 8 experts"),
        ("thinker_config.text_config.num_key_value_heads", 3, "must divide the 4 heads"),
        ("thinker_config.text_config.rope_scaling", {"rope_type": "yarn"}, "rope_type='yarn'"),
        ("thinker_config.text_config.rope_scaling", {"mrope_section": [6, 6, 5]}, "add up to 16"),
        ("thinker_config.text_config.mlp_only_layers", [1], "mlp_only_layers=[1]: must be []"),
        ("talker_config.speaker_id", {}, "must name at least one voice"),
        ("talker_config.speaker_id", {"a": -1}, "speaker_id.a_id=-1"),
        ("talker_config.accept_hidden_layer", 7, "the Thinker has 6 layers"),
        ("talker_config.thinker_hidden_size", 48, "must be the 64 of thinker_config"),
        ("talker_config.num_code_groups", 1, "num_code_groups=6: must be 1"),
        ("talker_config.code_predictor_config.hidden_size", 32, "must be the 48"),
        ("code2wav_config.num_quantizers", 8, "num_quantizers=8: must be the 6"),
        ("code2wav_config.decoder_dim", 50, "to be halved 4 times"),
        ("code2wav_config.rope_theta", None, "code2wav_config: it has no rope_theta"),
        ("code2wav_config.sliding_window", 0, "sliding_window=0: must be an integer"),
    ],
)
def test_configs_that_cannot_be_are_refused(path, value, said, changed):
    with pytest.raises(WeightsError) as caught:
        networks(changed(path, value))
    assert said in str(caught.value)


def test_random_weights_will_do():
    found = load_networks(TINY, device="cpu", dtype=torch.bfloat16, dummy=True)
    assert found.omni.thinker.embed_tokens.weight.dtype == torch.bfloat16
    assert found.vocoder.code_embedding.weight.dtype == torch.float32
    wave = found.vocoder(torch.zeros(1, 6, 3, dtype=torch.int64))
    assert wave.shape == (1, 3 * 1920 - 555)
    hidden = found.omni.thinker(torch.tensor([1, 2, 3]))
    assert found.omni.thinker.logits(hidden).isfinite().all()
    with pytest.raises(WeightsError, match="there is no"):
        load_networks(TINY.parent, device="cpu", dtype=torch.float32)


def test_bfloat16_says_the_same(goldens):
    found = load_networks(TINY, device="cpu", dtype=torch.bfloat16)
    thinker = found.omni.thinker
    ids = goldens["0.input_ids"].tolist()
    for token in goldens["0.thinker_generated"].tolist():
        assert int(thinker.logits(thinker(torch.tensor(ids)))[-1].argmax()) == token
        ids.append(token)


# -- as the engine runs it -----------------------------------------------------------------------


def test_the_engine_runs_the_thinker_on_ids_and_on_media(goldens, loop):
    """Prefill of wide rows and of text, in one batch, then decoding together."""
    thinker = loop.omni.thinker
    pool = KVPool(thinker.kv_layout, 1024, device=torch.device("cpu"), dtype=torch.float32)
    lm = LanguageModel("lm", thinker, pool)
    greedy = SamplingParams(temperature=0.0)
    ids = goldens["2.input_ids"]
    inputs = thinker.embed(ids)
    inputs[ids == loop.config.thinker.audio_token_id] = thinker.wide(goldens["2.audio_tower_out"])
    prompts = {0: goldens["0.input_ids"].tolist(), 2: inputs}
    with lm.open_cache() as text, lm.open_cache() as sound:
        caches = {0: text, 2: sound}
        samplers = {case: lm.sampler.open(greedy, []) for case in prompts}
        spans = {
            case: Span(kv, prompts[case], len(prompts[case]), sampler=samplers[case], hidden=True)
            for case, kv in caches.items()
        }
        said = {case: [] for case in prompts}
        for step in range(11):
            for span in spans.values():
                span.kv.reserve(span.count, set())
            steps = dict(zip(spans, lm._run(list(spans.values())), strict=True))
            if not step:
                accepted = thinker.accepted(steps[2].hidden)
                torch.testing.assert_close(
                    accepted, goldens["2.thinker_hidden_accept"][: len(ids)], atol=5e-4, rtol=0
                )
            for case, found in steps.items():
                said[case].append(found.token)
                spans[case] = Span(caches[case], found, 1, sampler=samplers[case])
    for case, tokens in said.items():
        assert tokens == goldens[f"{case}.thinker_generated"].tolist()[:11]
