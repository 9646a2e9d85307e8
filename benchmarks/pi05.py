"""pi0.5 on this machine: milliseconds per call, and the published computation beside it.

    python benchmarks/pi05.py [--case tiny|mid|full] [--device cpu|cuda] [--cameras 3 2]
        [--calls N] [--resize openpi] [--json]

A call is `policy.infer` with camera images of 480 x 640 bytes; `full` is the published size with
random weights, `mid` a quarter of its widths and depths; both have images of 224 x 224 and chunks
of 50. `plain` is `mstar/models/pi05/plain.py` on the same weights, eager: every camera slot and 200
tokens of text, padded and masked, all of the last layer, no tables. It is given what preprocessing
made, so only the networks are compared; ours has its thread, its queue and both ends of the call on
top. Parts are medians; `outside` is all of ours that is not the networks. The two run in turn.

On a GPU a call is one graph, `networks` with its copies; vision, prefix and flow are measured as
graphs of their own. The roofline is the sum over those of max(FLOPs / peak, bytes of weights /
bandwidth), by default an H200's in bfloat16: 790 TFLOP/s and 4.3 TB/s. `ready` is loading and
warming up.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mstar import Engine
from mstar.engine.captured import CapturedSteps, record
from mstar.engine.threads import threads_for
from mstar.engine.weights import weight_bytes
from mstar.models.pi05.card import CARD
from mstar.models.pi05.config import Pi05Config
from mstar.models.pi05.networks import Policy, load_policy
from mstar.models.pi05.plain import PlainPolicy

MID = {
    "vocab_size": 512,
    "vision": {
        "hidden_size": 288,
        "intermediate_size": 1076,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "patch_size": 14,
    },
    "prefix": {"width": 512, "depth": 5, "mlp_dim": 4096, "num_heads": 8, "num_kv_heads": 1},
    "expert": {"width": 256, "depth": 5, "mlp_dim": 1024, "num_heads": 8, "num_kv_heads": 1},
}
TASK = "Pick up the red block and put it on the plate beside the cup."
NETWORK = ("vision", "prefix", "flow")
OTHER = ("preprocess", "postprocess")


def make_case(case: str, folder: Path) -> Path:
    """The folder of a checkpoint; but for that of `tiny`, it has no weights, and 8 state dims."""
    source = (CARD.full if case == "full" else CARD.tiny) / "pi05"
    if case == "tiny":
        return source
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.*"), dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    config["input_features"]["observation.state"]["shape"] = [8]
    if case == "mid":
        for part in ("prefix", "expert"):
            MID[part]["head_dim"] = 64
        size = {"image_resolution": [224, 224], "chunk_size": 50, "n_action_steps": 50}
        config |= {**size, "custom_dims": MID}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def cost(config: Pi05Config, cameras: int, text: int, bits: int) -> dict[str, tuple[float, float]]:
    """FLOPs and bytes of weights of the parts of a call.

    Args:
        text: tokens.
        bits: bytes of a weight.
    """
    sizes, horizon = config.vision, config.chunk_size
    patches, hidden = sizes.positions, sizes.hidden_size
    vision = sizes.layers * (4 * hidden**2 + 2 * hidden * sizes.intermediate_size)
    vision += hidden * (sizes.patch_dim + config.prefix.width)
    seeing = 2 * vision * patches + sizes.layers * 4 * patches**2 * hidden

    def layer(gemma: Any) -> tuple[int, int, int]:
        """Weights; those for keys and values; what queries have in all."""
        rows, kv = (n * gemma.head_dim for n in (gemma.num_heads, 2 * gemma.num_kv_heads))
        return gemma.width * (2 * rows + kv + 3 * gemma.mlp_dim), gemma.width * kv, rows

    tokens = cameras * patches + text
    weights, last, rows = layer(config.prefix)
    prefix = (config.prefix.depth - 1) * weights + last
    reading = 2 * prefix * tokens + (config.prefix.depth - 1) * 4 * tokens**2 * rows
    weights, _, rows = layer(config.expert)
    expert, steps = config.expert.depth * weights, config.num_inference_steps
    acting = 2 * expert * horizon + config.expert.depth * 4 * horizon * (tokens + horizon) * rows
    return {
        "vision": (cameras * seeing, bits * vision),
        "prefix": (reading, bits * prefix),
        "flow": (steps * acting, steps * bits * expert),
    }


class Split:
    """Adds up where the time of calls goes, by wrapping what they call."""

    def __init__(self, engine: Engine, policy: Any) -> None:
        model, self.seconds = engine.model, defaultdict(float)
        networks, processor = model.policy, model.processor
        self.wrap(processor, "prepare", "preprocess")
        self.wrap(policy, "for_robot", "postprocess")
        self.network = NETWORK
        if model.whole is not None:
            self.network = ("networks",)
            self.wrap(model.act, "run", "networks")
            return
        self.wrap(networks, "encode_images", "vision")
        self.wrap(networks, "prefix", "prefix")
        velocity = networks.velocity

        def timed_velocity(*args: Any) -> Any:
            return self.timed(self.timed(velocity, "flow")(*args), "flow")

        networks.velocity = timed_velocity

    def wrap(self, owner: Any, name: str, part: str) -> None:
        object.__setattr__(owner, name, self.timed(getattr(owner, name), part))

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - began

        return call


class Bench:
    """One engine, and the plain computation with its weights."""

    def __init__(self, engine: Engine, size: tuple[int, int], limits: tuple[float, float]) -> None:
        self.engine, self.policy, self.limits = engine, engine.policy(), limits
        self.fast = engine.model.policy
        self.split = Split(engine, self.policy)
        self.plain = PlainPolicy(self.whole())
        dice = np.random.default_rng(0)
        self.images = {
            key: dice.integers(0, 256, (*size, 3), np.uint8)
            for key in self.policy.robot.images.values()
        }
        self.state = dice.uniform(-0.5, 0.5, 8).tolist()
        shape = self.policy.config.chunk_size, self.policy.config.max_action_dim
        self.noise = dice.standard_normal(shape).astype(np.float32)

    def whole(self) -> Policy:
        """The published network; where the fast one has less of it, the rest is random."""
        weight = self.fast.trunk.projector.weight
        whole = load_policy(
            Path(),
            device=weight.device,
            dtype=weight.dtype,
            config=self.policy.config,
            dummy=True,
            whole=True,
        )
        with torch.inference_mode():
            ours = whole.state_dict()
            for name, x in self.fast.state_dict().items():
                ours[name][-len(x) :] = x
        return whole

    def observation(self, cameras: int) -> dict[str, Any]:
        images = dict(list(self.images.items())[:cameras])
        return {**images, "observation.state": self.state, "task": TASK}

    def padded(self, cameras: int) -> tuple[torch.Tensor, ...]:
        """What the plain computation takes."""
        observed = self.policy.robot.observe(self.observation(cameras))
        seen = self.policy.processor.prepare(observed.images, observed.state, observed.prompt)
        slots, length = len(self.policy.config.cameras), self.policy.config.tokenizer_max_length
        images = seen.images.new_full((1, slots, *seen.images.shape[1:]), -1.0)
        images[0, :cameras] = seen.images
        ids = seen.ids.new_zeros(1, length)
        ids[0, : len(seen.ids)] = seen.ids
        there = torch.arange(slots).unsqueeze(0) < cameras
        mask = torch.arange(length).unsqueeze(0) < len(seen.ids)
        noise = torch.from_numpy(self.noise).unsqueeze(0)
        return tuple(x.to(self.engine.device) for x in (images, there, ids, mask, noise))

    def graphs(
        self, cameras: int, padded: tuple[torch.Tensor, ...], calls: int
    ) -> dict[str, float]:
        """Milliseconds of the parts of a captured call, and of its roofline."""
        images, _, ids, mask, noise = padded
        fast, config = self.fast, self.policy.config
        length = int(mask.sum())
        images, ids = images[0, :cameras], ids[0, :length]
        with torch.inference_mode():
            table = fast.table(config.num_inference_steps)
            seen = fast.encode_images(images).flatten(0, 1)
            tokens = torch.cat([seen, fast.embed_text(ids).to(seen.dtype)]).unsqueeze(0)
            kv = fast.prefix(tokens)
            parts = {
                "vision": (lambda x: (fast.encode_images(x),), images),
                "prefix": (lambda x: (fast.prefix(x).layers,), tokens),
                "flow": (lambda x: (fast.denoise(kv, x, table),), noise),
            }
            steps, found = CapturedSteps(record(), self.engine.device), {}
            for name, (step, given) in parts.items():
                times = []
                for _ in range(calls + 3):
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    steps.run(step, given, key=name)
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - began)
                found[name] = 1e3 * float(np.median(times[3:]))
        return found

    def roofline(self, text: int, cameras: int, peak: float, bandwidth: float) -> float:
        """The least milliseconds that a call can take."""
        bits = self.fast.trunk.projector.weight.element_size()
        costs = cost(self.policy.config, cameras, text, bits)
        return 1e3 * sum(max(flops / peak, size / bandwidth) for flops, size in costs.values())

    def compare(self, cameras: int, calls: int, plain_calls: int) -> dict[str, Any]:
        """Times of both, in milliseconds."""
        observation, padded = self.observation(cameras), self.padded(cameras)
        steps = self.policy.config.num_inference_steps

        def ours() -> np.ndarray:
            return self.policy.infer(observation, noise=self.noise, raw=True)["actions"]

        def published() -> np.ndarray:
            with torch.inference_mode():
                return self.plain.sample(*padded, steps)[0].cpu().numpy()

        off = np.abs(ours() - published()[:, : self.policy.processor.action_dim]).max()
        for _ in range(3):
            ours()
        names = (*self.split.network, *OTHER)
        rows, cpu, other = [], 0.0, []
        every = max(1, calls // plain_calls)
        for call in range(calls):
            self.split.seconds.clear()
            began, busy = time.perf_counter(), time.process_time()
            ours()
            whole = time.perf_counter() - began
            cpu += time.process_time() - busy
            rows.append([whole, *(self.split.seconds[part] for part in names)])
            if call % every == 0 and len(other) < plain_calls:
                began = time.perf_counter()
                published()
                other.append(time.perf_counter() - began)
        times, *parts = 1e3 * np.array(rows).T
        quantiles = np.percentile(times, [50, 95, 99])
        outside = times - sum(parts[: len(self.split.network)])
        medians = {
            **{name: np.median(part) for name, part in zip(names, parts, strict=True)},
            "rest": np.median(times - sum(parts)),
            "outside": np.median(outside),
        }
        plain = 1e3 * float(np.median(other))
        if self.engine.device.type == "cuda":
            medians |= self.graphs(cameras, padded, 50)
            least = self.roofline(int(padded[3].sum()), cameras, *self.limits)
            medians |= {"roofline": least, "of roofline": least / quantiles[0]}
        return {
            **dict(zip(("p50", "p95", "p99", "max"), [*quantiles, times.max()], strict=True)),
            "cpu": 1e3 * cpu / calls,
            **medians,
            "plain p50": plain,
            "ratio": plain / quantiles[0],
            "differs by": off,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=("tiny", "mid", "full"), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak", type=float, default=790, help="TFLOP/s of the GPU")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s of the GPU")
    parser.add_argument("--cameras", type=int, nargs="+", default=[3, 2], choices=(1, 2, 3))
    parser.add_argument("--calls", type=int, help="1,000; 40 of mid and full on a CPU")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--resize", choices=("lerobot", "openpi"), default="lerobot")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    calls = args.calls or (1000 if args.case == "tiny" or args.device == "cuda" else 40)
    limits = 1e12 * args.peak, 1e12 * args.bandwidth
    report: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        options = {
            "weights": make_case(args.case, Path(temporary)),
            "load_format": "auto" if args.case == "tiny" else "dummy",
            "options": {"resize": args.resize},
            "device": args.device,
        }
        began = time.perf_counter()
        with Engine("pi05", **options) as engine:
            engine.policy().warmup()
            ready = time.perf_counter() - began
            torch.set_num_threads(threads_for(weight_bytes(engine.model.policy)))
            bench = Bench(engine, tuple(args.size), limits)
            for _ in range(args.rounds):
                for cameras in args.cameras:
                    row = bench.compare(cameras, calls, min(calls, 40))
                    row = {"cameras": cameras, **{k: float(v) for k, v in row.items()}}
                    report.append({**row, "ready": ready, "load": os.getloadavg()[0]})
                    if not args.json:
                        show(report[-1], calls)
    if args.json:
        json.dump(report, sys.stdout, indent=2)


def show(row: dict[str, Any], calls: int) -> None:
    ms = {name: f"{value:.2f}" for name, value in row.items() if name != "cameras"}
    names = [name for name in (*NETWORK, "networks", *OTHER, "rest") if name in ms]
    parts = "  ".join(f"{name} {ms[name]}" for name in names)
    if "roofline" in ms:
        parts += f"  roofline {ms['roofline']} ({100 * row['of roofline']:.0f} % of it)"
    print(
        f"{row['cameras']} cameras, {calls} calls, load {ms['load']}: "
        f"p50 {ms['p50']}  p95 {ms['p95']}  p99 {ms['p99']}  max {ms['max']} ms, "
        f"{ms['cpu']} ms of CPU\n"
        f"  {parts}\n"
        f"  outside the networks {ms['outside']} ms; plain {ms['plain p50']} ms: {ms['ratio']}x "
        f"(results differ by {row['differs by']:.1e}); ready in {row['ready']:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
