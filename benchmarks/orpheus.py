"""Orpheus on this machine: ours against transformers + snac, on the same weights and prompts.

    python benchmarks/orpheus.py [--case tiny|mid] [--tokens N] [--json]

The baseline is the published streaming example: `transformers` `generate` with a streamer, and one
`snac` decode of the last 28 tokens for every 7 new ones. It serves one request after another, which
is also what it is compared with at 8 concurrent requests; all of them arrive at once, and first
audio counts from then. Every contestant runs in a process of its own, so that peak memory is its
own. The pair is run in turn `--rounds` times and medians are taken.

`first_audio_early_s` is ours alone and unloaded, with `lookahead=1`: 14 tokens instead of 28 before
the first chunk, which is approximate then.

Cases: `tiny`, the checkpoint in the package, with the sampling defaults; `mid`, 12 layers 1,024
wide with the full vocabulary and random weights, greedy with a fixed length (they never stop).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mstar" / "models" / "orpheus"
TEXTS = [
    "Hello there, how are you doing today?",
    "The quick brown fox jumps over the lazy dog.",
    "<laugh> It's 12345 o'clock!",
    "I am fine, thank you very much. <sigh>",
    "No voice prefix here.",
    "Please read this sentence aloud.",
    "One more sentence for the road.",
    "And this is the last of the eight.",
]
VOICES = ["tara", "leah", "zac", "leo", "", "mia", "dan", "zoe"]
MID = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
STOP, AUDIO, FRAME = 128258, 128266, 2048


def make_case(case: str, folder: Path) -> dict[str, str]:
    """Checkpoint folders of a case; `mid` is written with random weights."""
    if case == "tiny":
        return {part: str(PACKAGE / "tiny" / part) for part in ("lm", "snac")}
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((PACKAGE / "tiny" / "lm" / "config.json").read_text()) | MID
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        # The layers whisper, and each audio token points at one of the next slot: random weights
        # that speak well-formed frames without end.
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.01
            layer.mlp.down_proj.weight *= 0.01
        slots = torch.arange(AUDIO, AUDIO + 7 * 4096).view(7, 4096)
        model.lm_head.weight.zero_()
        embedding = model.model.embed_tokens.weight
        for slot in range(7):
            shuffled = slots[(slot + 1) % 7][torch.randperm(4096)]
            model.lm_head.weight[shuffled] = embedding[slots[slot]]
        model.lm_head.weight[slots[0, 0]] += embedding[128257]
    model.save_pretrained(folder / "lm")
    (folder / "lm" / "config.json").write_text(json.dumps(config))
    shutil.copy(PACKAGE / "tiny" / "lm" / "tokenizer.json", folder / "lm")
    return {"lm": str(folder / "lm"), "snac": str(PACKAGE / "tiny" / "snac")}


def sampling(case: str, tokens: int) -> dict:
    """Request parameters of a case."""
    if case == "tiny":
        return {"temperature": 0.6, "top_p": 0.8, "repetition_penalty": 1.3, "max_new": tokens}
    return {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, "max_new": tokens}


def run_ours(folders: dict[str, str], how: dict, streams: int) -> dict:
    """`streams` concurrent streaming requests through the engine."""
    from mstar import Engine

    fixed = how["temperature"] == 0.0
    params = {k: how[k] for k in ("temperature", "top_p", "repetition_penalty")}
    params |= {"max_output_tokens": how["max_new"], "ignore_eos": fixed}

    def one(engine: Engine, index: int, out: list) -> None:
        began, first = time.perf_counter(), None
        for event in engine.generate(
            text=TEXTS[index], voice=VOICES[index], stream=True, seed=index, **params
        ):
            first = first or time.perf_counter() - began
            last = event
        out.append((first, last.usage.generated_tokens, last.usage.audio_seconds))

    with Engine("orpheus", weights=folders, device="cpu") as engine:
        one(engine, 0, [])
        early: list = []
        params["lookahead"] = 1
        one(engine, 0, early)
        params["lookahead"] = 3
        out: list = []
        began = time.perf_counter()
        threads = [threading.Thread(target=one, args=(engine, i, out)) for i in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        figures = summary(out, time.perf_counter() - began)
    return figures | {"first_audio_early_s": early[0][0]}


def run_baseline(folders: dict[str, str], how: dict, streams: int) -> dict:
    """The published streaming example, `streams` requests one after another."""
    import torch
    from safetensors.torch import load_file
    from snac import SNAC
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.generation.streamers import BaseStreamer

    lm = AutoModelForCausalLM.from_pretrained(folders["lm"], dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=folders["lm"] + "/tokenizer.json")
    codec = SNAC.from_config(folders["snac"] + "/config.json").eval()
    codec.load_state_dict(load_file(folders["snac"] + "/model.safetensors"))

    class Speaker(BaseStreamer):
        def __init__(self, arrived: float) -> None:
            self.began, self.first = arrived, None
            self.tokens: list[int] = []
            self.total, self.samples, self.prompt_seen = 0, 0, False

        def put(self, value: torch.Tensor) -> None:
            if not self.prompt_seen:
                self.prompt_seen = True
                return
            self.total += 1
            token = int(value) - AUDIO - 4096 * (len(self.tokens) % 7)
            if not 0 <= token < 4096:
                return
            self.tokens.append(token)
            if len(self.tokens) % 7 or len(self.tokens) < 28:
                return
            frames = torch.tensor(self.tokens[-28:]).view(4, 7)
            codes = [frames[:, :1], frames[:, [1, 4]], frames[:, [2, 3, 5, 6]]]
            with torch.inference_mode():
                wave = codec.decode([c.reshape(1, -1) for c in codes])[:, :, FRAME : 2 * FRAME]
            (wave * 32767).to(torch.int16).numpy().tobytes()
            self.samples += FRAME
            self.first = self.first or time.perf_counter() - self.began

        def end(self) -> None:
            pass

    def one(index: int, arrived: float) -> tuple:
        voice = VOICES[index]
        text = f"{voice}: {TEXTS[index]}" if voice else TEXTS[index]
        ids = [128259, *tokenizer(text).input_ids, 128009, 128260, 128261, 128257]
        speaker = Speaker(arrived)
        greedy = how["temperature"] == 0.0
        options: dict = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
        if not greedy:
            options |= {k: how[k] for k in ("temperature", "top_p", "repetition_penalty")}
        torch.manual_seed(index)
        lm.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=how["max_new"],
            eos_token_id=None if greedy else STOP,
            pad_token_id=128263,
            streamer=speaker,
            **options,
        )
        return speaker.first, speaker.total, speaker.samples / 24000

    one(0, 0.0)
    began = time.perf_counter()
    out = [one(index, began) for index in range(streams)]
    figures = summary(out, time.perf_counter() - began)
    return figures | {"first_audio_early_s": figures["first_audio_s"]}


def summary(out: list, wall: float) -> dict:
    """Figures of one contestant."""
    firsts = [first for first, _, _ in out if first is not None]
    audio = sum(seconds for _, _, seconds in out)
    return {
        "tokens_per_s": sum(tokens for _, tokens, _ in out) / wall,
        "first_audio_s": statistics.median(firsts) if firsts else float("nan"),
        "real_time_factor": wall / audio if audio else float("nan"),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def contest(folders: dict[str, str], how: dict, streams: int, rounds: int) -> dict:
    """Medians of both contestants, run in turn."""
    results: dict[str, list[dict]] = {"ours": [], "baseline": []}
    for _ in range(rounds):
        for who in results:
            job = json.dumps({"who": who, "folders": folders, "how": how, "streams": streams})
            done = subprocess.run(
                [sys.executable, __file__, "--job", job], capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            results[who].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        who: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for who, runs in results.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=("tiny", "mid"), action="append")
    parser.add_argument("--streams", type=int, action="append")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        run = run_ours if job["who"] == "ours" else run_baseline
        print(json.dumps(run(job["folders"], job["how"], job["streams"])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in args.case or ("tiny", "mid"):
            folders = make_case(case, Path(folder))
            how = sampling(case, args.tokens or (512 if case == "tiny" else 70))
            for streams in args.streams or (1, 8):
                figures = contest(folders, how, streams, args.rounds)
                rows.append({"case": case, "streams": streams, **figures})
                if not args.json:
                    show(rows[-1])
    if args.json:
        print(json.dumps(rows, indent=1))


def show(row: dict) -> None:
    """One block of the table."""
    ours, base = row["ours"], row["baseline"]
    print(
        f"{row['case']}, {row['streams']} stream(s)      {'ours':>10} {'baseline':>10} {'ratio':>7}"
    )
    for key, unit in (
        ("tokens_per_s", "tok/s"),
        ("first_audio_s", "s"),
        ("first_audio_early_s", "s"),
        ("real_time_factor", "s/s"),
        ("peak_mb", "MiB"),
    ):
        ratio = ours[key] / base[key]
        print(f"  {key:<18} {unit:<6} {ours[key]:>10.3f} {base[key]:>10.3f} {ratio:>7.2f}")


if __name__ == "__main__":
    main()
