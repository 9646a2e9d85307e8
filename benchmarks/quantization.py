"""What weights of 8 bits save, and how far the results move: every model's tiny checkpoint.

    python benchmarks/quantization.py [--models orpheus bagel ...] [--device cuda] [--json]

`weights` are the bytes of all networks beside those of float32. `error` is the root mean square of
what has changed, divided by that of the float32 result, which the tests hold equal to the published
implementations' goldens; `agree` is how often the best token stays the best. What 16 bits without
quantisation change is a row of its own, for comparison.

    hidden states or scores: of the same random tokens; nothing is sampled.
    actions (pi05), latents (vjepa2): of a whole call from the same noise and pictures.

Tiny checkpoints have random weights in narrow layers: real ones, which are wider and trained, lose
less or more. `--weights FOLDER` measures a real one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mstar import Engine
from mstar.engine.layers.quantized import Quantized

KINDS = ("bfloat16", "int8", "fp8")
TOKENS = 96
Parts = dict[str, Tensor]  # part of a model -> its result


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ids(network: Any) -> Tensor:
    return torch.randint(network.vocab_size, (TOKENS,), generator=_random(0))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_random(1))


def orpheus(engine: Engine) -> Parts:
    """Scores of the next token."""
    llama = engine.model.networks[0]
    return {"scores": llama.logits(llama(_ids(llama).to(engine.device)))}


def bagel(engine: Engine) -> Parts:
    """Scores of the next token, and velocities of latents."""
    net = engine.model.networks[0]
    decoder = net.decoder
    x = decoder.embed(_ids(decoder).to(engine.device))
    lead = _normal(TOKENS, x.shape[1]).to(x) * x.float().std()
    hidden = decoder(torch.cat([lead, x]), lead=TOKENS)
    velocity = net.latents.velocity(decoder.norm_lead(hidden[:TOKENS]))
    return {"scores": decoder.logits(decoder(x)), "velocity": velocity}


def qwen3_omni(engine: Engine) -> Parts:
    """Scores of the Thinker, of the Talker, and of the other codes of frames."""
    omni = engine.model.networks[0]
    talker, codes = omni.talker, []
    hidden = talker(_ids(talker).to(engine.device))
    zeros = hidden.new_zeros(TOKENS, dtype=torch.int64)
    first = talker.embed(zeros)
    talker.code_predictor(hidden, first, lambda scores: zeros, keep=codes)
    thinker = omni.thinker
    return {
        "thinker scores": thinker.logits(thinker(_ids(thinker).to(engine.device))),
        "talker scores": talker.scores(hidden),
        "codes scores": torch.stack(codes),
    }


def pi05(engine: Engine) -> Parts:
    """A chunk of actions."""
    policy = engine.model.networks[0]
    config, device = policy.config, engine.device
    images = _normal(2, 3, *config.vision.image_size).clamp(-1, 1).to(device)
    ids = torch.randint(config.vocab_size, (24,), generator=_random(0)).to(device)
    noise = _normal(config.chunk_size, config.max_action_dim).to(device)
    return {"actions": policy.sample(images, ids, noise, policy.table(10))}


def _clip(frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, 64, 64, 3), np.uint8)


def vjepa2(engine: Engine) -> Parts:
    """Latents of a clip, and what the predictor makes of them."""
    seen = engine.encode(_clip(8))
    return {"latents": seen.tensor, "predicted": engine.predict(seen).tensor}


def vjepa2_ac(engine: Engine) -> Parts:
    """Latents of a frame, and those after two actions."""
    seen = engine.encode(_clip(1))
    moves = 0.05 * _normal(2, 7).numpy()
    rolled = engine.rollout(seen, moves, np.zeros(7, np.float32))
    return {"latents": seen.tensor, "rollout": rolled.latents.tensor}


MODELS: dict[str, Callable[[Engine], Parts]] = {
    f.__name__: f for f in (orpheus, bagel, qwen3_omni, pi05, vjepa2, vjepa2_ac)
}


def measure(
    model: str, device: str = "cpu", kinds: Sequence[str] = KINDS, **options: Any
) -> list[dict[str, Any]]:
    """A row for every kind of weights and every part of the model."""
    rows, exact, full = [], {}, 0
    for kind in ("float32", *kinds):
        how = {"dtype": kind} if kind.startswith(("bf", "fl")) else {"quantization": kind}
        given = {"device": device, "dtype": "float32", **how, **options}
        with Engine(f"{model}-tiny" if "weights" not in options else model, **given) as engine:
            size = engine.stats()["memory"]["weights"]
            layers = [
                layer
                for network in engine.model.networks
                for layer in network.modules()
                if isinstance(layer, Quantized)
            ]
            with torch.inference_mode():
                found = {part: x.float().cpu() for part, x in MODELS[model](engine).items()}
        if kind == "float32":
            exact, full = found, size
            continue
        for part, x in found.items():
            true = exact[part]
            row = {"model": model, "kind": kind, "layers": len(layers), "part": part}
            row |= {"bytes": size, "of": full, "error": float((x - true).norm() / true.norm())}
            if part.endswith("scores"):
                row["agree"] = float((x.argmax(-1) == true.argmax(-1)).float().mean())
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", help="a folder or repository, of one model")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    more = {} if options.weights is None else {"weights": options.weights}
    form = "{:<11}{:<9}{:>7}  {:<15}{:>9}{:>10}{:>8}"
    if not options.json:
        print(form.format("model", "kind", "layers", "result", "weights", "error", "agree"))
    for model in options.models:
        for row in measure(model, options.device, **more):
            if options.json:
                print(json.dumps(row), flush=True)
                continue
            agree = f"{row['agree']:.0%}" if "agree" in row else ""
            weights, error = f"{row['bytes'] / row['of']:.0%}", f"{row['error']:.2%}"
            columns = (row["model"], row["kind"], row["layers"], row["part"])
            print(form.format(*columns, weights, error, agree), flush=True)


if __name__ == "__main__":
    main()
