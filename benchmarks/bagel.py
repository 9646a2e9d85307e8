"""BAGEL on this machine: ours against a plain loop over the same networks and weights.

    python benchmarks/bagel.py [--case tiny|mid] [--timesteps N] [--rounds N] [--json]

The plain loop (`tests/models/bagel/bagel_loop.py`) computes every branch of guidance after another,
every step, every request by itself; text token by token. `published` is the same loop with the
branches that the published inferencer computes: those inside the guidance interval. Requests of a
batch are all there at once.

Both draw the same images from the same seeds, with the published defaults (text guidance 4, image
guidance 1.5, or 2 in an edit). `mid` is six layers 768 wide with random weights, 256 x 256 pixels.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
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
        self.size, self.tokens = size, tokens
        self.params = {"num_timesteps": timesteps, "cfg_text_scale": 4.0, "cfg_img_scale": 1.5}
        edit = {"cfg_img_scale": 2.0, "cfg_interval": (0.0, 1.0), "cfg_renorm_type": "text_channel"}
        self.edit = {**self.params, **edit}
        self.image = Image.radial_gradient("L").resize((size, size)).convert("RGB")

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
                    levels = self.loop.draw(self.size, self.size, params, every=every)
                    Image.fromarray(levels.numpy()).save(io.BytesIO(), "PNG", compress_level=1)


def seconds(run: Callable[[str, int], None], task: str, count: int) -> float:
    began = time.perf_counter()
    run(task, count)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=("tiny", "mid"), default="mid")
    parser.add_argument("--timesteps", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tasks = [("draw", count) for count in args.batches] + [("edit", 1), ("text", 1), ("look", 1)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_case(args.case, Path(temporary))
        load_format = "auto" if args.case == "tiny" else "dummy"
        # Every request is new to the caches, as those of the plain loop are.
        options = {"load_format": load_format, "device": "cpu", "prefix_cache": False}
        with Engine("bagel", weights=folder, **options) as engine:
            engine.model.features.max_bytes = 0
            size = 128 if args.case == "tiny" else 256
            bench = Bench(engine, size, args.timesteps, args.tokens)
            if args.case == "tiny":
                torch.set_num_threads(1)  # as the engine does: a second one is in the way
            report = {}
            for task, count in tasks:
                ways = {"ours": bench.ours, "plain": bench.plain, "published": bench.published}
                times: dict[str, list[float]] = {way: [] for way in ways}
                for _ in range(args.rounds):
                    for way, run in ways.items():
                        times[way].append(seconds(run, task, count))
                row = {way: statistics.median(values) for way, values in times.items()}
                row["ratio"] = row["plain"] / row["ours"]
                row["ratio, published"] = row["published"] / row["ours"]
                report[f"{task} x{count}"] = row
                if not args.json:
                    show(task, count, row, args.tokens)
    if args.json:
        print(json.dumps(report, indent=2))


def show(task: str, count: int, row: dict[str, float], tokens: int) -> None:
    unit, amount = ("tokens/s", tokens) if task in ("text", "look") else ("images/s", count)
    print(
        f"{task:5} x{count}  ours {row['ours']:7.3f} s ({amount / row['ours']:7.2f} {unit})"
        f"  plain {row['plain']:7.3f} s  {row['ratio']:5.2f}x"
        f"  published {row['published']:7.3f} s  {row['ratio, published']:5.2f}x",
        flush=True,
    )


if __name__ == "__main__":
    main()
