"""Qwen3-Omni on this machine: ours against transformers' `generate`, on the same weights.

    python benchmarks/qwen3_omni.py [--streams 1 4 8] [--rounds 3] [--json]
    python benchmarks/qwen3_omni.py --device cuda --size full   (ours alone: random weights, bf16)

Ours serves as many streaming requests, which arrive at once. `generate` serves one request after
another (`baseline`); it gives nothing out before its end, so that the whole time counts as its
first audio, and its first token is that of a call for one token. `batch` is one call of `generate`
for all of them, the best that it can do, and only with prompts and lengths that are equal. All are
greedy, with fixed lengths, in float32, one thread each (more are slower for all at this size; ours
has the vocoder in another), and each runs in a process of its own. They take turns, and the best of
the `--rounds` counts.

Figures: text tokens per second of all streams; first token and first audio, the median stream;
real-time factor: time for all / seconds of one stream's speech; audio: seconds of speech of all
streams made per second.

`--size full` needs a GPU with 80 GB. Beside its figures are the least times in which an H200 could
read the weights (a step of the Thinker at batch 1: 1.29 ms; a frame of speech: 0.63 ms), and the
share of them that was reached; and the shares of both loops in which the GPU had nothing to do
(`gpu_measure.idle`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

TINY = Path(__file__).parents[1] / "mstar" / "models" / "qwen3_omni" / "tiny" / "qwen3_omni"
PROMPT = "Hello there, what do you see?"
TOKENS, SPOKEN_TOKENS, FRAMES = 128, 24, 125  # 125 frames are ten seconds
FLOORS = {"token": 1.29, "frame": 0.63}  # ms on an H200 in bf16, at batch 1


def run_ours(numbers: Sequence[int], device: str, size: str) -> Iterator[dict[str, float]]:
    """As many streaming requests at once, for text and then for speech; one engine for all."""
    from mstar import Engine
    from mstar.types import AudioChunk

    text = {"min_tokens": TOKENS, "max_tokens": TOKENS, "ignore_eos": True}
    speech = {
        "min_tokens": SPOKEN_TOKENS,
        "max_tokens": SPOKEN_TOKENS,
        "output_modalities": ("text", "audio"),
        "talker_temperature": 0.0,
        "talker_min_tokens": FRAMES + 1,
        "talker_max_tokens": FRAMES + 1,
    }

    def one(engine: Engine, asked: dict, out: list) -> None:
        began, first_text, first_audio = time.perf_counter(), None, None
        for event in engine.stream(text=PROMPT, **asked):
            now = time.perf_counter() - began
            if isinstance(event, AudioChunk):
                first_audio = first_audio or (now if len(event.pcm) else None)
            else:
                first_text = first_text or now
        out.append((first_text, first_audio, event.usage))

    def all_of(engine: Engine, asked: dict, streams: int) -> tuple[list, float]:
        out: list = []
        began = time.perf_counter()
        threads = [threading.Thread(target=one, args=(engine, asked, out)) for _ in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return out, time.perf_counter() - began

    model, options = ("qwen3_omni-tiny", {}) if size == "tiny" else ("qwen3_omni", {})
    if size == "full":
        options = {"load_format": "dummy"}
    with Engine(model, device=device, cpu_threads=1, **options) as engine:
        for streams in numbers:
            for asked in (text, speech):
                all_of(engine, asked, streams)
            written, text_wall = all_of(engine, text, streams)
            said, wall = all_of(engine, speech, streams)
            figures = figures_of(text_wall, wall, streams)
            figures["first_token_s"] = statistics.median(first for first, _, _ in written)
            figures["first_audio_s"] = statistics.median(first for _, first, _ in said)
            assert all(abs(usage.audio_seconds - FRAMES * 0.08) < 0.1 for _, _, usage in said)
            if device == "cuda":
                from gpu_measure import idle_during

                for name, asked in (("text", text), ("speech", speech)):
                    found = idle_during(partial(all_of, engine, asked, streams))
                    figures |= {f"{name}_{key}": value for key, value in found.items()}
            yield figures


def run_baseline(streams: int, together: bool) -> dict[str, float]:
    """transformers' `generate`, for all `together` or for one after the other."""
    import torch
    from tokenizers import Tokenizer
    from transformers import Qwen3OmniMoeForConditionalGeneration as Published

    torch.set_num_threads(1)
    model = Published.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa")
    model = model.eval()
    prompt = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(prompt).ids
    batch = torch.tensor([ids] * (streams if together else 1))
    turns = 1 if together else streams
    end = model.config.im_end_token_id

    def text(tokens: int) -> float:
        began = time.perf_counter()
        model.thinker.generate(
            batch, max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=end, do_sample=False
        )
        return time.perf_counter() - began

    def speech() -> float:
        began = time.perf_counter()
        _, waves = model.generate(
            batch,
            speaker="Ethan",
            return_audio=True,
            thinker_max_new_tokens=SPOKEN_TOKENS,
            thinker_min_new_tokens=SPOKEN_TOKENS,
            thinker_eos_token_id=end,
            thinker_do_sample=False,
            talker_do_sample=False,
            talker_max_new_tokens=FRAMES + 1,
            talker_min_new_tokens=FRAMES + 1,
        )
        assert abs(waves[0].shape[-1] / 24000 - FRAMES * 0.08) < 0.2
        return time.perf_counter() - began

    with torch.inference_mode():
        text(2)
        one, said = text(TOKENS), speech()
        figures = figures_of(one * turns, said * turns, streams)
        # The median stream waits for half of the others.
        waits = (turns - 1) / 2
        first = {"first_token_s": waits * one + text(1), "first_audio_s": (waits + 1) * said}
        return figures | first


def figures_of(text_wall: float, wall: float, streams: int) -> dict[str, float]:
    """What follows from the times of both runs."""
    seconds = FRAMES * 0.08
    return {
        "text_tokens_per_s": TOKENS * streams / text_wall,
        "real_time_factor": wall / seconds,
        "audio_per_s": seconds * streams / wall,
    }


def job(who: str, streams: int, device: str, size: str) -> dict[str, float]:
    """A contestant, in a process of its own."""
    args = json.dumps([who, streams, device, size])
    done = subprocess.run(
        [sys.executable, __file__, "--job", args], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        who, streams, device, size = json.loads(args.job)
        if who == "ours":
            print(json.dumps(next(run_ours([streams], device, size))))
        else:
            print(json.dumps(run_baseline(streams, who == "batch")))
        return
    if (args.device, args.size) != ("cpu", "tiny"):
        alone(args)
        return
    contestants = ["ours", "baseline", "batch"]
    rows = []
    for streams in args.streams:
        runs: dict[str, list[dict]] = {who: [] for who in contestants}
        for _ in range(args.rounds):
            for who in contestants:
                runs[who].append(job(who, streams, args.device, args.size))
        best = {
            who: {
                key: (max if key.endswith("per_s") else min)(run[key] for run in found)
                for key in found[0]
            }
            for who, found in runs.items()
        }
        rows.append({"streams": streams, **best})
        if not args.json:
            show(rows[-1])
    if args.json:
        print(json.dumps(rows, indent=1))


def alone(args: argparse.Namespace) -> None:
    """Ours without the others: a row as soon as it is there, as a line of JSON."""
    found = run_ours(args.streams, args.device, args.size)
    for streams, ours in zip(args.streams, found, strict=True):
        row = {"streams": streams, "ours": ours}
        if args.size == "full":
            row["of_roofline"] = roofline(ours, streams)
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            show(row)


def roofline(ours: dict[str, float], streams: int) -> dict[str, float]:
    """Milliseconds of a step of all streams, and the floors of batch 1 divided by them."""
    token = 1000 * streams / ours["text_tokens_per_s"]
    frame = 80 * ours["real_time_factor"]
    shares = {"token": FLOORS["token"] / token, "frame": FLOORS["frame"] / frame}
    return {"token_ms": token, "frame_ms": frame, **shares}


def show(row: dict) -> None:
    """One block of the table."""
    ours = row["ours"]
    print(f"{row['streams']} stream(s)               ours   baseline            batch")
    for key, value in ours.items():
        line = f"  {key:<18} {value:>11.3f}"
        for who in ("baseline", "batch"):
            if who in row:
                line += f"{row[who][key]:>11.3f} ({value / row[who][key]:.2f})"
        print(line)
    for key, value in row.get("of_roofline", {}).items():
        print(f"  {key:<18} {value:>11.3f}")


if __name__ == "__main__":
    main()
