"""Orpheus and BAGEL at their published sizes on a GPU, with random weights.

    python benchmarks/gpu_models.py orpheus|compiled|bagel [--device cpu --tiny]

Prints one JSON object a line, as the figures come. The other families' benchmarks run on a GPU by
themselves; `gpu.py` calls them all. A step is the difference of two runs of different lengths, over
the difference of their lengths; `of_floor` is its time over that of reading its weights. `gpu_idle`
is the share of a decoding loop in which the GPU did nothing, `gpu_waits` that of its gaps of more
than 10 us: there it waited for the host. `compiled` is the step of transformers' `generate` with a
static cache, which it compiles on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_measure import idle_during
from PIL import Image

from mstar import Engine
from mstar.engine.weights import weight_bytes
from mstar.models import registry
from mstar.types import AudioChunk

TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why it does."
SPOKEN_TOKENS_PER_S = 7 * 24000 / 2048


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def step(run: Callable[[int], object], short: int, long: int) -> float:
    """Seconds of a step, from runs of two lengths; the best of two of each."""
    times = [min(seconds(lambda n=n: run(n)) for _ in range(2)) for n in (short, long)]
    return (times[1] - times[0]) / (long - short)


def idle_in(engine: Engine, run: Callable[[], object]) -> Iterator[dict]:
    """What a GPU does not do meanwhile; nothing without one."""
    if engine.device.type == "cuda":
        yield idle_during(run)


def together(engine: Engine, requests: list[dict[str, Any]]) -> list[Any]:
    handles = [engine.submit(**request, stream=False) for request in requests]
    return [handle.result() for handle in handles]


# -- Orpheus -------------------------------------------------------------------------------------


def untied(folder: Path, tiny: bool) -> dict[str, Path]:
    """Folders of Orpheus whose head is a matrix of its own, so that it can be made to speak; a step
    reads as much as with the published one."""
    card = registry.get("orpheus")
    source = card.tiny if tiny else card.full
    shutil.copytree(source / "lm", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return {"lm": folder, "snac": source / "snac"}


@torch.inference_mode()
def make_speak(network: torch.nn.Module) -> None:
    """Random weights that speak well-formed frames without end: the layers whisper, and every audio
    token points at one of the next slot."""
    audio, codes, start = 128266, 4096, 128257
    for layer in network.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.01)
        layer.mlp.down_proj.weight.mul_(0.01)
    network.model.norm.weight.fill_(1)
    head, embedding = network.lm_head.weight, network.model.embed_tokens.weight
    slots = torch.arange(audio, audio + 7 * codes, device=head.device).view(7, codes)
    head.zero_()
    for slot in range(7):
        after = slots[(slot + 1) % 7][torch.randperm(codes, device=head.device)]
        head[after] = embedding[slots[slot]]
    head[slots[0, 0]] += embedding[start]


def orpheus(device: str, tiny: bool, bandwidth: float = 0.0) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as temporary:
        folders = untied(Path(temporary) / "lm", tiny)
        began = time.perf_counter()
        with Engine("orpheus", weights=folders, load_format="dummy", device=device) as engine:
            yield {"ready_s": time.perf_counter() - began}
            sizes = ((28, 42), 2) if tiny else ((70, 350), 64)
            yield from speaking(engine, *sizes, bandwidth)
    gc.collect()
    yield {"transformers_step_ms_1": 1e3 * published_step(device, tiny)}


def floors(seconds: float, read: float, bandwidth: float) -> dict[str, float]:
    """How many times as long a step takes as reading its weights."""
    return {"of_floor": seconds * bandwidth / read} if bandwidth else {}


def speaking(
    engine: Engine, lengths: tuple[int, int], streams: int, bandwidth: float
) -> Iterator[dict]:
    network = engine.model.networks[0]
    make_speak(network)
    read = weight_bytes(network) - weight_bytes(network.model.embed_tokens)
    yield {"bytes_of_a_step": read}

    def ask(tokens: int) -> dict[str, Any]:
        greedy = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}
        return {"text": TEXT, **greedy, "max_output_tokens": tokens, "ignore_eos": True}

    engine.generate(**ask(lengths[0]))
    firsts = [first_audio(engine, ask(42)) for _ in range(5)]
    yield {"first_audio_ms": 1e3 * statistics.median(firsts)}
    one = step(lambda n: engine.generate(**ask(n)), *lengths)
    yield {"step_ms_1": 1e3 * one, **floors(one, read, bandwidth)}
    yield from idle_in(engine, lambda: engine.generate(**ask(lengths[0])))
    many = step(lambda n: together(engine, [ask(n)] * streams), *lengths)
    yield {f"step_ms_{streams}": 1e3 * many, **floors(many, read, bandwidth)}
    yield from idle_in(engine, lambda: together(engine, [ask(lengths[0])] * streams))
    yield {"real_time_streams": streams / many / SPOKEN_TOKENS_PER_S, "at_streams": streams}


def first_audio(engine: Engine, asked: dict[str, Any]) -> float:
    began = time.perf_counter()
    for event in engine.stream(**asked):
        if isinstance(event, AudioChunk) and len(event.pcm):
            return time.perf_counter() - began
    raise RuntimeError("no audio came")


def compiled(device: str, tiny: bool) -> Iterator[dict]:
    yield {"transformers_compiled_step_ms_1": 1e3 * published_step(device, tiny, "static")}


def published_step(device: str, tiny: bool, cache: str | None = None) -> float:
    """A step of transformers' `generate`, at batch 1, with random weights. With a static cache it
    compiles its network on a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    card = registry.get("orpheus")
    config = json.loads(((card.tiny if tiny else card.full) / "lm" / "config.json").read_text())
    dtype = torch.float32 if tiny else torch.bfloat16
    torch.set_default_dtype(dtype)
    with torch.device(device):
        network = LlamaForCausalLM(LlamaConfig(**config)).eval()
    torch.set_default_dtype(torch.float32)
    ids = torch.arange(20, device=device).unsqueeze(0)

    def run(tokens: int) -> None:
        network.generate(
            ids,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
        )
        if ids.is_cuda:
            torch.cuda.synchronize()

    return step(run, *((16, 80) if not tiny else (2, 4)))


# -- BAGEL ---------------------------------------------------------------------------------------


def bagel(device: str, tiny: bool) -> Iterator[dict]:
    card = registry.get("bagel")
    size, steps, few = (1024, 50, 8) if not tiny else (64, 3, 3)
    image = Image.radial_gradient("L").resize((size, size)).convert("RGB")
    weights = {"weights": card.tiny / "bagel"} if tiny else {}
    draw = {"text": TEXT, "output_modalities": ("image",), "cfg_text_scale": 4.0}

    def drawing(seed: int, timesteps: int) -> dict[str, Any]:
        return {**draw, "seed": seed, "num_timesteps": timesteps, "height": size, "width": size}

    def editing(timesteps: int) -> dict[str, Any]:
        return {**draw, "num_timesteps": timesteps, "images": image, "cfg_img_scale": 2.0}

    began = time.perf_counter()
    with Engine("bagel", load_format="dummy", device=device, **weights) as engine:
        yield {"ready_s": time.perf_counter() - began}
        text = {"text": TEXT, "ignore_eos": True}
        run = lambda n: engine.generate(**text, max_output_tokens=n)  # noqa: E731
        run(4)
        yield {"text_step_ms_1": 1e3 * step(run, *((16, 144) if not tiny else (2, 6)))}
        yield from idle_in(engine, lambda: run(2 if tiny else 64))
        engine.generate(**drawing(0, 3))
        yield {"image_s": seconds(lambda: engine.generate(**drawing(1, steps))), "timesteps": steps}
        engine.generate(**editing(3))
        yield {"edit_s": seconds(lambda: engine.generate(**editing(steps)))}
        alone = seconds(lambda: engine.generate(**drawing(2, few)))
        together(engine, [drawing(seed, 3) for seed in range(4)])
        four = seconds(lambda: together(engine, [drawing(seed, few) for seed in range(4)]))
        yield {"throughput_of_4": 4 * alone / four}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("orpheus", "compiled", "bagel"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--bandwidth", type=float, default=0.0, help="TB/s, for the floor of steps")
    args = parser.parse_args()
    torch.manual_seed(0)
    models = {
        "orpheus": partial(orpheus, bandwidth=1e12 * args.bandwidth),
        "compiled": compiled,
        "bagel": bagel,
    }
    for figures in models[args.model](args.device, args.tiny):
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
