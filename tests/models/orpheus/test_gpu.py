"""Orpheus on a GPU: the same tokens as on the CPU, captured and not, looking ahead and not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mstar import Engine
from mstar.engine.captured import record
from mstar.engine.weights import Checkpoint, load
from mstar.models import orpheus
from mstar.models.orpheus.codec import Codec, CodecJob
from mstar.models.orpheus.snac import SnacConfig, SnacDecoder

pytestmark = pytest.mark.gpu

DATA = Path(__file__).parents[2] / "data" / "orpheus"
CASES = json.loads((DATA / "goldens.json").read_text())["cases"]
TINY = Path(orpheus.__file__).parent / "tiny" / "snac"
GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "codec_noise": "off"}


def speak(engine: Engine, **more) -> list[np.ndarray]:
    requests = [{"text": c["text"], "voice": c["voice"] or "", **more} for c in CASES]
    return [result.audio.pcm for result in engine.generate_batch(requests)]


@pytest.fixture(scope="module")
def on_cpu():
    with Engine("orpheus-tiny", device="cpu") as engine:
        return speak(engine, **GREEDY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("warmup", [False, True])
def test_greedy_speech_is_that_of_the_cpu(on_cpu, dtype, look_ahead, warmup):
    options = {"dtype": dtype, "look_ahead": look_ahead, "warmup": warmup}
    with Engine("orpheus-tiny", device="cuda", **options) as engine:
        for got, want in zip(speak(engine, **GREEDY), on_cpu, strict=True):
            assert len(got) == len(want)  # the tokens are exact: the margins are large
            assert np.abs(got.astype(int) - want).max() <= 8
        assert engine.stats()["nodes"]["lm"]["pages"]["used"] == 0


def test_a_seed_gives_the_same_speech_alone_and_in_a_batch():
    with Engine("orpheus-tiny", device="cuda") as engine:
        together = speak(engine, seed=5)
        for case, pcm in zip(CASES, together, strict=True):
            alone = engine.generate(text=case["text"], voice=case["voice"] or "", seed=5)
            assert len(alone.audio.pcm) == len(pcm)


def test_a_preempted_request_goes_on_where_it_was():
    with Engine("orpheus-tiny", device="cuda", kv_tokens=512) as engine:
        lengths = [len(pcm) for pcm in speak(engine, **GREEDY, max_output_tokens=300)]
        assert lengths == [case["samples"] for case in CASES]
        assert engine.stats()["nodes"]["lm"]["pages"]["preemptions"] > 0


def codec_on(device: str) -> SnacDecoder:
    with torch.device("meta"):
        snac = SnacDecoder(SnacConfig.from_file(TINY / "config.json"))
    return load(snac, Checkpoint.open(TINY), device=device, dtype=torch.float32)


def test_the_codec_is_float32_though_torch_lets_convolutions_use_tf32():
    assert torch.backends.cudnn.allow_tf32  # torch's default
    cpu, gpu = codec_on("cpu"), codec_on("cuda")
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(4096, (2, 8 * rate), generator=generator) for rate in (1, 2, 4)]
    waves = gpu([level.cuda() for level in codes])
    torch.testing.assert_close(waves.cpu(), cpu(codes), rtol=0, atol=5e-6)
    for here, there in zip(cpu.modules(), gpu.modules(), strict=True):
        if type(here).__name__ == "Depthwise":
            x = torch.randn(2, 40, len(here.bias), generator=generator)
            torch.testing.assert_close(there(x.cuda()).cpu(), here(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("captured", [False, True])
def test_batches_of_the_codec_in_a_stream_of_its_own_are_those_of_the_cpu(captured, seed):
    codes = torch.randint(4096, (12, 7), generator=torch.Generator().manual_seed(1))
    jobs = [
        CodecJob(codes[low : low + 7].flatten().tolist(), low, low + 7, seed, (3, 4))
        for low in range(6)
    ]
    wanted = Codec(codec_on("cpu"), torch.device("cpu")).run(jobs)
    codec = Codec(codec_on("cuda"), torch.device("cuda"), record() if captured else None)
    with torch.inference_mode():
        codec.capture(1, len(jobs))
    torch.cuda.synchronize()
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        found = [codec.run(jobs) for _ in range(5)]  # pinned memory is used again and again
    for pcm in found:
        for got, want in zip(pcm, wanted, strict=True):
            assert np.abs(got.astype(int) - want).max() <= 1
