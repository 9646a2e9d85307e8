"""BAGEL on this machine: ours against a plain loop over the same networks and weights.

    python benchmarks/bagel.py [--device cpu|cuda] [--case tiny|mid|full] [--rounds N] [--json]

The plain loop (`tests/models/bagel/bagel_loop.py`) computes every branch of guidance after another,
every step, every request by itself; text token by token. `published` is the same loop with the
branches that the published inferencer computes: those inside the guidance interval. Requests of a
batch are all there at once; the loops take one in each round, whose time counts for each of them.
The contestants take turns, and the best time of each is shown.

All draw the same images from the same seeds, with the published defaults (text guidance 4, image
guidance 1.5, or 2 in an edit). Cases: `mid` is six layers 768 wide with random weights, 256 x 256
pixels (the default on a CPU); `full` has the published sizes with random weights, 1024 x 1024 (on
a GPU: bfloat16, 50 timesteps); `tiny` is the checkpoint in the package.

Two more lines tell how near that is to what the machine can do. The flow loop's rate is the FLOPs
of the branches that were computed, counted as in the cost table of the model's reference (2 per
multiply-add; linear layers and attention of the decoder), over the seconds that more steps take;
beside it the rate of one large product. Text has the bytes of the weights that a token reads, over
the seconds that more tokens take, and the rate at which a large tensor is read.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "models" / "bagel"))

from bagel_loop import Loop  # noqa: E402

from mstar import Engine  # noqa: E402
from mstar.engine.layers.linear import linear  # noqa: E402
from mstar.models.bagel.card import CARD  # noqa: E402

PROMPTS = [
    "A photo of a red bicycle leaning on a wall.",
    "A paper boat on a lake at dawn.",
    "An old map of an island that does not exist.",
    "A fox in the snow, oil on canvas.",
    "A bowl of lemons beside a window.",
    "A lighthouse in a storm.",
    "Two robots playing chess in a park.",
    "A tram that climbs a steep street.",
]
QUESTION = "Describe the image in detail."
LAYERS = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}


def make_case(case: str, folder: Path) -> Path:
    """The folder of a checkpoint; that of `mid` holds configs only."""
    tiny = CARD.tiny / "bagel"
    if case == "tiny":
        return tiny
    for name in ("tokenizer.json", "llm_config.json", "vit_config.json", "config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    change(folder / "llm_config.json", LAYERS)
    vision = {"hidden_size": 288, "intermediate_size": 1152, "num_attention_heads": 4}
    change(folder / "vit_config.json", {**vision, "num_hidden_layers": 7, "image_size": 256})
    rule = {"max_size": 256, "min_size": 128, "max_pixels": 1806336}
    transforms = {"vae": {**rule, "stride": 16}, "vit": {**rule, "stride": 8}}
    more = {"vit_max_num_patch_per_side": 32, "image_transforms": transforms}
    change(folder / "config.json", more)
    return folder


def change(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


class Bench:
    """One engine, the loop over its networks, and the tasks for both."""

    def __init__(self, engine: Engine, size: int, timesteps: int, tokens: int) -> None:
        self.engine = engine
        model = engine.model
        self.loop = Loop(model.bagel, model.autoencoder, copy(model.tokenizer))
        self.loop.watch = False
        self.size, self.tokens, self.timesteps = size, tokens, timesteps
        self.params = {"cfg_text_scale": 4.0, "cfg_img_scale": 1.5}
        edit = {"cfg_img_scale": 2.0, "cfg_interval": (0.0, 1.0), "cfg_renorm_type": "text_channel"}
        self.edit = {**self.params, **edit}
        self.image = Image.radial_gradient("L").resize((size, size)).convert("RGB")
        self.flops = 0.0
        self._count_flops()

    def ours(self, task: str, count: int) -> None:
        handles = [self.engine.submit(**self.request(task, i), stream=False) for i in range(count)]
        for handle in handles:
            handle.result()

    def request(self, task: str, index: int) -> dict[str, Any]:
        if task in ("text", "look"):
            images = {"images": self.image} if task == "look" else {}
            limit = {"max_output_tokens": self.tokens, "ignore_eos": True}
            return {"text": QUESTION, **images, **limit}
        asked = {"seed": index, "output_modalities": ("image",), "text": PROMPTS[index]}
        asked["num_timesteps"] = self.timesteps
        if task == "edit":
            return {**asked, "images": self.image, **self.edit}
        return {**asked, "height": self.size, "width": self.size, **self.params}

    def published(self, task: str, count: int) -> None:
        self.plain(task, count, every=False)

    def plain(self, task: str, count: int, *, every: bool = True) -> None:
        with torch.inference_mode():
            for index in range(count):
                self.loop.begin(index)
                if task in ("look", "edit"):
                    self.loop.image(self.image, draw=task == "edit")
                self.loop.text(QUESTION if task in ("text", "look") else PROMPTS[index])
                if task in ("text", "look"):
                    tokenizer = self.loop.tokenizer
                    end, tokenizer.end = tokenizer.end, -1  # a fixed length
                    self.loop.write(self.loop.main, self.tokens)
                    tokenizer.end = end
                else:
                    params = self.edit if task == "edit" else self.params
                    params = {**params, "num_timesteps": self.timesteps}
                    levels = self.loop.draw(self.size, self.size, params, every=every).cpu()
                    Image.fromarray(levels.numpy()).save(io.BytesIO(), "PNG", compress_level=1)

    # -- how near to what the machine can do ---------------------------------------------------

    def flow_rate(self, count: int, rounds: int) -> float:
        """FLOP/s of the flow loop of so many drawings."""
        whole, times, flops = self.timesteps, [], []
        for timesteps in (whole, whole // 2 + 1):
            self.timesteps, self.flops = timesteps, 0.0
            times.append(min(seconds(self.ours, "draw", count) for _ in range(rounds)))
            flops.append(self.flops / rounds)
        self.timesteps = whole
        return (flops[0] - flops[1]) / (times[0] - times[1])

    def token_seconds(self, rounds: int) -> float:
        """Seconds per token of one stream of text."""
        whole, times = self.tokens, []
        for self.tokens in (whole // 2, whole):
            times.append(min(seconds(self.ours, "text", 1) for _ in range(rounds)))
        return (times[1] - times[0]) / (whole - whole // 2)

    def token_bytes(self) -> int:
        """Weights that one token of text reads."""
        decoder = self.engine.model.bagel.decoder
        parts = [layer.und for layer in decoder.model.layers] + [decoder.lm_head]
        return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())

    def _count_flops(self) -> None:
        stepper, llm = self.engine.model.flow.stepper, self.engine.model.config.llm
        size, kv = llm.hidden_size, llm.num_key_value_heads * llm.head_dim
        products = size * (size + 2 * kv) + size * size + 3 * size * llm.intermediate_size
        run = stepper.run

        def counting(calls: list[Any]) -> torch.Tensor:
            for call in calls:
                for draft in call.branches:
                    seen = draft.kv.length + call.tokens
                    each = 2 * products + 4 * size * seen
                    self.flops += llm.num_hidden_layers * call.tokens * each
            return run(calls)

        stepper.run = counting


def seconds(run: Callable[[str, int], None], task: str, count: int) -> float:
    began = time.perf_counter()
    run(task, count)
    return time.perf_counter() - began


def best(run: Callable[[], Any], device: torch.device, times: int = 8) -> float:
    """Least seconds of a few runs."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = []
    for _ in range(times):
        wait()
        began = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - began)
    return min(found)


def machine(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large product, and bytes/s of reading a large tensor."""
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 2048
    x, y = torch.randn(2, n, n, device=device, dtype=dtype)
    large = torch.zeros((1 << 30) if on_gpu else (1 << 26), device=device, dtype=dtype)
    with torch.inference_mode():
        product = best(lambda: linear(x, y), device)
        reading = best(large.sum, device)
    return 2 * n**3 / product, large.numel() * large.element_size() / reading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--case", choices=("tiny", "mid", "full"))
    parser.add_argument("--timesteps", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    case = args.case or ("full" if device.type == "cuda" else "mid")
    timesteps = args.timesteps or (50 if case == "full" else 9)
    tokens = args.tokens or (128 if case == "full" else 32)
    rounds = args.rounds or (1 if case == "full" else 3)
    with tempfile.TemporaryDirectory() as temporary:
        # Every request is new to the caches, as those of the plain loop are.
        options = {"device": device.type, "prefix_cache": False}
        if case != "tiny":
            options["load_format"] = "dummy"
        if case != "full":
            options["weights"] = make_case(case, Path(temporary))
        with Engine("bagel", **options) as engine:
            engine.model.features.max_bytes = 0
            if case == "tiny":
                torch.set_num_threads(1)  # as the engine does: a second one is in the way
            size = {"tiny": 128, "mid": 256, "full": 1024}[case]
            bench = Bench(engine, size, timesteps, tokens)
            report = compare(bench, args.batches, rounds, show=not args.json)
            report["roofline"] = roofline(bench, device, rounds, show=not args.json)
    if args.json:
        print(json.dumps(report, indent=2))


def compare(bench: Bench, batches: list[int], rounds: int, *, show: bool) -> dict[str, Any]:
    """All contestants in all tasks."""
    report = {}
    tasks = [("draw", count) for count in batches] + [("edit", 1), ("text", 1), ("look", 1)]
    if bench.engine.device.type == "cuda":  # what is compiled or captured for a first time
        for task, count in tasks:
            bench.ours(task, count)
    for task, count in tasks:
        ways = {"ours": (bench.ours, count), "plain": (bench.plain, 1)}
        ways["published"] = bench.published, 1
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, (run, number) in ways.items():
                times[way].append(seconds(run, task, number) * count / number)
        row = {way: min(values) for way, values in times.items()}
        row["ratio"] = row["plain"] / row["ours"]
        row["ratio, published"] = row["published"] / row["ours"]
        report[f"{task} x{count}"] = row
        if show:
            tell(task, count, row, bench.tokens)
    return report


def roofline(bench: Bench, device: torch.device, rounds: int, *, show: bool) -> dict[str, float]:
    """What the flow loop and text reach, and what the machine does."""
    product, reading = machine(device, bench.engine.model.bagel.latents.vae2llm.weight.dtype)
    row = {
        "flow, FLOP/s": bench.flow_rate(1, rounds),
        "flow x4, FLOP/s": bench.flow_rate(4, rounds),
        "product, FLOP/s": product,
        "text, s/token": bench.token_seconds(rounds),
        "reading, B/s": reading,
    }
    row["text, B/s"] = bench.token_bytes() / row["text, s/token"]
    if show:
        one, four = row["flow, FLOP/s"], row["flow x4, FLOP/s"]
        print(
            f"flow loop  {one / 1e12:.3g} TFLOP/s, four images {four / 1e12:.3g}; "
            f"a product {product / 1e12:.3g}: {one / product:.0%} and {four / product:.0%}"
        )
        print(
            f"text  {row['text, s/token'] * 1e3:.3g} ms per token, reads "
            f"{row['text, B/s'] / 1e9:.3g} GB/s of {reading / 1e9:.3g}: "
            f"{row['text, B/s'] / reading:.0%}"
        )
    return row


def tell(task: str, count: int, row: dict[str, float], tokens: int) -> None:
    unit, amount = ("tokens/s", tokens) if task in ("text", "look") else ("images/s", count)
    print(
        f"{task:5} x{count}  ours {row['ours']:7.3f} s ({amount / row['ours']:7.2f} {unit})"
        f"  plain {row['plain']:7.3f} s  {row['ratio']:5.2f}x"
        f"  published {row['published']:7.3f} s  {row['ratio, published']:5.2f}x",
        flush=True,
    )


if __name__ == "__main__":
    main()
