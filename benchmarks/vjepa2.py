"""V-JEPA 2 on this machine: encoder and predictor, and those of transformers beside them.

    python benchmarks/vjepa2.py [--size mid|vitl|vith|vitg|vitg-384] [--frames N] [--batch N]
        [--device cuda] [--dtype bfloat16] [--calls N] [--json]

Both have the same random weights, read from the same folder, and are given the same pixels, so only
networks are compared; they run in turn, best of `--calls`. `encoder` is a clip to its tokens;
`predictor` has all tokens as context and all as targets, `future` predicts one time of the grid, as
a step of a rollout does. `engine` is `engine.encode` from frames in memory: preprocessing, copies,
queue. `mid` has half of ViT-L's width, a sixth of its depth, and frames of 128 x 128.

`peak` is the share of an H200's 989 TFLOP/s (dense, bfloat16) that the products take, in ours: only
meaningful on one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import VJEPA2Config as HubConfig
from transformers import VJEPA2Model

from mstar import Engine
from mstar.models.vjepa2.config import PUBLISHED, BlockSizes, VJEPA2Config
from mstar.models.vjepa2.preprocess import normalise

PEAK = 989e12
SIZES = {
    "mid": replace(
        PUBLISHED["vitl"],
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        crop_size=128,
        pred_hidden_size=192,
        pred_num_attention_heads=6,
        pred_num_hidden_layers=4,
    ),
    **PUBLISHED,
}


def make(config: VJEPA2Config, folder: Path, dtype: torch.dtype, device: str) -> None:
    """A checkpoint with random weights."""
    values = {name: value for name, value in vars(config).items() if name != "labels"}
    torch.manual_seed(0)
    with torch.device(device):  # a large one takes its time on a CPU
        network = VJEPA2Model(HubConfig(**values))
    network.to(dtype).save_pretrained(folder)


def cost(blocks: BlockSizes, depth: int, tokens: int, queries: int | None = None) -> float:
    """FLOPs of a stack of blocks; of the last one `queries` are wanted."""
    width, wanted = blocks.width, tokens if queries is None else queries
    rows = tokens * (depth - 1) + wanted
    return (
        2 * 2 * width**2 * tokens * depth  # keys, values
        + 2 * (2 * width**2 + 2 * width * blocks.hidden) * rows
        + 4 * width * tokens * rows
    )


def flops(config: VJEPA2Config, tokens: int) -> dict[str, float]:
    """Of each part, for one clip."""
    encoder, predictor = config.encoder, config.predictor
    patch = 3 * config.tubelet_size * config.patch_size**2
    both = 2 * config.hidden_size * config.pred_hidden_size  # into the predictor's width, or back
    depth, plane = config.pred_num_hidden_layers, config.grid**2
    return {
        "encoder": cost(encoder.blocks, encoder.depth, tokens)
        + 2 * patch * config.hidden_size * tokens,
        "predictor": cost(predictor, depth, 2 * tokens, tokens) + 2 * both * tokens,
        "future": cost(predictor, depth, tokens + plane, plane) + both * (tokens + plane),
    }


def best(calls: int, *functions: Callable[[], object]) -> list[float]:
    """Least seconds of each, in turn."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(calls + 1):
        for function, taken in zip(functions, seconds, strict=True):
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
    return [min(taken[1:]) for taken in seconds]


def run(args: argparse.Namespace, folder: Path) -> dict:
    config = SIZES[args.size]
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    make(config, folder, dtype, args.device)
    hub = VJEPA2Model.from_pretrained(folder, dtype=dtype).to(args.device).eval()
    side, grid = config.crop_size, config.grid
    frames = torch.randint(256, (args.frames, side, side, 3), dtype=torch.uint8)
    with Engine(folder, device=args.device, dtype=dtype) as engine, torch.inference_mode():
        net = engine.model.net
        clips = frames.permute(0, 3, 1, 2).expand(args.batch, -1, -1, -1, -1).to(args.device)
        pixels = normalise(clips).to(dtype)
        tokens = net.encoder(pixels)
        count = tokens.shape[1]
        ids = torch.arange(count, device=args.device).expand(args.batch, -1)
        ahead = count + 2 * grid**2 + torch.arange(grid**2, device=args.device)
        ahead = ahead.expand(args.batch, -1)

        def theirs(targets: Tensor) -> Tensor:
            return hub.predictor(tokens, [ids], [targets]).last_hidden_state

        names = ("encoder", "predictor", "future")
        mine = (
            lambda: net.encoder(pixels),
            lambda: net.predictor(tokens, ids, ids, grid, grid),
            lambda: net.predictor(tokens, ids, ahead, grid, grid),
        )
        others = (
            lambda: hub.get_vision_features(pixels),
            lambda: theirs(ids),
            lambda: theirs(ahead),
        )
        apart = {
            name: float((ours().float() - other().float()).abs().max())
            for name, ours, other in zip(names, mine, others, strict=True)
        }
        *seconds, whole = best(args.calls, *mine, *others, lambda: engine.encode(frames.numpy()))
    wanted = flops(config, count)
    rows = {
        name: {
            "ms": round(1e3 * mine, 2),
            "transformers_ms": round(1e3 * other, 2),
            "ratio": round(other / mine, 2),
            "peak": round(args.batch * wanted[name] / mine / PEAK, 4),
            "apart": apart[name],
        }
        for name, mine, other in zip(names, seconds[:3], seconds[3:], strict=True)
    }
    place = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    return {
        **{"size": args.size, "frames": args.frames, "batch": args.batch, "tokens": count},
        **{"device": place, "dtype": str(dtype).removeprefix("torch."), "parts": rows},
        "threads": torch.get_num_threads(),
        "engine_ms": round(1e3 * whole, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(args, Path(folder))
    if args.json:
        print(json.dumps(found))
        return
    rows, engine = found.pop("parts"), found.pop("engine_ms")
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    for name, row in rows.items():
        line = f"{name:10} {row['ms']:9.2f} ms, transformers {row['transformers_ms']:9.2f} ms: "
        peak = f"{100 * row['peak']:.1f} % of peak; " * (args.device == "cuda")
        print(f"{line}{row['ratio']:.2f} x; {peak}apart by {row['apart']:.1e}")
    print(f"engine     {engine:9.2f} ms")


if __name__ == "__main__":
    main()
