"""V-JEPA 2-AC on this machine: rollouts and plans, and the published computation beside them.

    python benchmarks/vjepa2_ac.py [--case mid|full] [--device cuda] [--horizons 4 15 30]
        [--plans 800x1x10 400x2x10] [--shrink N] [--calls N] [--cpu-time] [--json]

`rollout` is `engine.rollout` from frames, `plan` is `engine.plan` with context and goal encoded
before; best of `--calls`, by the clock on the wall or, on a busy machine, by CPU time. Beside them,
on the same weights, the published computation: a rollout encodes all 8 frames of its clip, each as
two, and every step computes all frames again, with a dense mask; a plan does so for every
candidate, and so do the latents that costs are of. `mid` has random weights and a quarter of the
published widths and depths (frames of 128 x 128, 8 x 8 patches, which keeps the shares of attention
and MLP as they are at full size). A plan is samples x horizon x iterations; `--shrink` divides the
samples and does two iterations, for machines without a GPU.

`floor` is the least time that the products of the full computation take at the peak of an H200
(989 TFLOP/s in bfloat16), as a share of the time taken: only meaningful with `--case full` on one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mstar import Engine
from mstar.models.vjepa2.ac_config import AcConfig
from mstar.models.vjepa2.ac_predictor import Frames
from mstar.models.vjepa2.cem import Cem
from mstar.models.vjepa2.networks import AcNetworks
from mstar.models.vjepa2.poses import trajectory
from mstar.models.vjepa2.preprocess import pixels
from mstar.models.vjepa2.rotary import rotate

MID = {
    "img_size": [128, 128],
    "embed_dim": 384,
    "depth": 10,
    "num_heads": 6,
    "mlp_ratio": 4.0,
    "pred_embed_dim": 256,
    "pred_depth": 6,
    "pred_num_heads": 4,
}
Clock = Callable[[], float]
PEAK = 989e12  # FLOP/s of an H200, dense, bfloat16


class Published:
    """The published computation on networks of ours: nothing is kept from step to step."""

    def __init__(self, networks: AcNetworks) -> None:
        self.networks, self.predictor = networks, networks.predictor
        tokens, most = self.predictor.frame_tokens, networks.config.max_frames
        frame = torch.arange(most * tokens, device=networks.device) // tokens
        self.mask = frame[:, None] >= frame[None]

    def encode(self, frames: Tensor) -> Tensor:
        """Latents `[1, frames, patches, dim]`, every frame shown twice."""
        net = self.networks
        clips = pixels(frames.to(net.device), net.config.img_size).unsqueeze(1)
        return net.predictor.norm(net.encoder(clips.repeat(1, 2, 1, 1, 1))).unsqueeze(0)

    def predict(self, latents: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Latents `[samples, 1, patches, dim]` after the last frame."""
        predictor, count = self.predictor, latents.shape[1]
        tokens = predictor.tokens(Frames(latents, actions, states))
        x = torch.cat(tokens, 2).flatten(1, 2)
        turned, heads = predictor._turned(0, count), self.networks.config.pred_num_heads
        mask = self.mask[: x.shape[1], : x.shape[1]]
        for block in predictor.predictor_blocks:
            qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1))
            q, k, v = (each.transpose(1, 2) for each in (*_turn(qkv, turned), qkv[:, :, 2]))
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + block.attn.proj(seen.transpose(1, 2).flatten(2))
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        patches = x.unflatten(1, (count, -1))[:, :, predictor.config.conditions :]
        return predictor.norm(predictor.predictor_proj(predictor.predictor_norm(patches)))[:, -1:]

    def rollout(self, latents: Tensor, actions: Tensor, poses: Tensor) -> Tensor:
        """Latents `[samples, horizon, patches, dim]`."""
        samples, horizon, _ = actions.shape
        z = latents[:, :1].expand(samples, -1, -1, -1)
        for step in range(1, horizon + 1):
            z = torch.cat([z, self.predict(z, actions[:, :step], poses[:, :step])], 1)
        return z[:, 1:]

    def plan(self, latents: Tensor, goal: Tensor, state: Tensor, cem: Cem, noise: Tensor) -> Tensor:
        """Actions `[horizon, 7]`."""
        mean, std = cem.start(noise.device)
        for drawn in noise:
            actions = cem.candidates(mean, std, drawn)
            found = self.rollout(latents, actions, trajectory(state, actions[:, :-1]))[:, -1]
            mean, std = cem.update(mean, std, actions, (found - goal).abs().mean((1, 2)).float())
        return cem.plan(mean)


def _turn(qkv: Tensor, turned) -> tuple[Tensor, Tensor]:
    return rotate(qkv[:, :, 0], turned), rotate(qkv[:, :, 1], turned)


def step_flops(config: AcConfig, frames: int) -> float:
    """Products of one cached step of one sample that sees so many frames, itself included."""
    width, tokens = config.pred_embed_dim, config.conditions + config.patches
    linear = 2 * tokens * (4 * width**2 + 2 * width * config.predictor.hidden)
    attention = 4 * tokens**2 * frames * width
    ends = 4 * config.patches * width * config.embed_dim
    return config.pred_depth * (linear + attention) + ends


def encode_flops(config: AcConfig) -> float:
    """Products of encoding one frame."""
    sizes, tokens = config.encoder.blocks, config.patches
    linear = 2 * tokens * (4 * sizes.width**2 + 2 * sizes.width * sizes.hidden)
    return config.depth * (linear + 4 * tokens**2 * sizes.width)


def timed(call: Callable[[], object], calls: int, device: torch.device, clock: Clock) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    best = float("inf")
    for count in range(calls + 1):
        began = clock()
        with torch.inference_mode():
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if count or calls == 1:
            best = min(best, clock() - began)
    return best


def compare(engine: Engine, options: argparse.Namespace) -> list[dict]:
    """One row for every rollout and plan."""
    model, device, rng = engine.model, engine.device, np.random.default_rng(0)
    config, published = model.config, Published(model.networks[0])
    height, width = config.img_size
    clip = rng.integers(0, 256, (8, height, width, 3), dtype=np.uint8)
    frames = torch.from_numpy(clip).permute(0, 3, 1, 2)
    state = torch.zeros(1, 7, device=device)
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows = []

    def row(name: str, ours: float, theirs: float, flops: float) -> None:
        rows.append(
            {
                "what": name,
                "ours_ms": 1e3 * ours,
                "published_ms": 1e3 * theirs,
                "ratio": theirs / ours,
                "floor": flops / PEAK / ours,
            }
        )

    for horizon in options.horizons:
        actions = rng.normal(0, 0.02, (horizon, 7)).astype(np.float32)
        there = torch.from_numpy(actions).to(device)[None]
        ours = timed(
            lambda a=actions: engine.rollout(clip[:1], a, np.zeros(7)), options.calls, device, clock
        )
        theirs = timed(
            lambda a=there: published.rollout(
                published.encode(frames), a, trajectory(state, a[:, :-1])
            ),
            options.slow_calls,
            device,
            clock,
        )
        flops = encode_flops(config) + sum(step_flops(config, n) for n in range(1, horizon + 1))
        row(f"rollout {horizon}", ours, theirs, flops)

    context, goal = engine.encode(clip[0]), engine.encode(clip[7])
    for plan in options.plans:
        samples, horizon, iterations = map(int, plan.split("x"))
        if options.shrink > 1:
            samples, iterations = max(10, samples // options.shrink), 2
        cem = Cem(samples=samples, horizon=horizon, iterations=iterations)
        noise = rng.standard_normal((iterations, horizon, samples, 4)).astype(np.float32)
        settings = {"samples": samples, "horizon": horizon, "iterations": iterations}
        ours = timed(
            lambda n=noise, s=settings: engine.plan(context, goal, np.zeros(7), noise=n, **s),
            options.calls,
            device,
            clock,
        )
        there = torch.from_numpy(noise).to(device)
        theirs = timed(
            lambda n=there, c=cem: published.plan(
                context.tensor[None], goal.tensor[0], state, c, n
            ),
            options.slow_calls,
            device,
            clock,
        )
        flops = samples * iterations * sum(step_flops(config, n) for n in range(1, horizon + 1))
        row(f"plan {samples}x{horizon}x{iterations}", ours, theirs, flops)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=("mid", "full"), default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--horizons", type=int, nargs="*", default=[4, 15, 30])
    parser.add_argument("--plans", nargs="*", default=["800x1x10", "400x2x10"])
    parser.add_argument("--shrink", type=int, help="by default 20 on a CPU, 1 on a GPU")
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--slow-calls", type=int, default=1, help="of the published computation")
    parser.add_argument("--cpu-time", action="store_true", help="not that of the wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.shrink is None:
        options.shrink = 20 if options.device == "cpu" else 1
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        given: dict = {"load_format": "dummy"}
        if options.case == "mid":
            config = json.dumps({"model_type": "vjepa2_ac", **MID})
            (Path(folder) / "config.json").write_text(config)
            given["weights"] = folder
        given |= {"device": options.device, "dtype": options.dtype, "cpu_threads": options.threads}
        with Engine("vjepa2_ac", **given) as engine:
            rows = compare(engine, options)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'':22}{'ours ms':>12}{'published ms':>14}{'ratio':>8}{'floor':>8}")
    for each in rows:
        times = f"{each['ours_ms']:12.1f}{each['published_ms']:14.1f}"
        print(f"{each['what']:22}{times}{each['ratio']:8.2f}{each['floor']:8.1%}")


if __name__ == "__main__":
    main()
