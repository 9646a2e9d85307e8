"""Kernels and models on one GPU, unattended, in less than ten minutes.

    python benchmarks/gpu.py [--kernels | --models] [--tune] [--json] [--out FILE]
    python benchmarks/gpu.py --device cpu --tiny      (tries the program; its figures mean nothing)

First the ceilings: bytes per second of a large copy and FLOPs per second of a large bfloat16
product. Then every kernel at the models' sizes: microseconds, how many times as fast as torch, and
the share of the ceiling; `differs by` is |ours - torch| / |torch|. Then every model at its
published size with random weights, with the figures that its own benchmark prints.

Everything runs in processes of its own: what fails or takes too long is told at the end, and the
rest goes on; where time is short, the last parts are left out (`--kernels` and `--models` apart fit
better). The exit code is 1 then, and 2 where there is no GPU. Results are kept, part by part, as
`benchmarks/results/<gpu>-<date>.json`. With `--tune`, the tiles of attention that are fastest and
those of matrix-vector products that beat the library's are measured again, with more care than a
warm-up takes, and kept in the user's cache (`mstar/engine/kernels/tuning.py` says where).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
LIMIT = 585.0  # seconds of everything
KERNELS_LIMIT = 220.0
MODEL_LIMIT = 170.0
WRONG = 2e-2  # relative; bfloat16 rounds by 4e-3

# Programs with figures of a model, at full size on a GPU and at the smallest on a CPU. {peak} and
# {bandwidth} are the ceilings in TFLOP/s and TB/s. For the last ones there may be no time left.
PI05 = "pi05.py --device cuda --case full --calls 1000 --peak {peak} --bandwidth {bandwidth} --json"
QWEN = "qwen3_omni.py --device cuda --size full --rounds 1 --json --streams 1 16"
LOOPS = "bagel.py --rounds 1 --json"
MODELS = {
    "orpheus": (
        "gpu_models.py orpheus --bandwidth {bandwidth}",
        "gpu_models.py orpheus --device cpu --tiny",
    ),
    "pi05": (PI05, "pi05.py --calls 3 --json"),
    "vjepa2": (
        "vjepa2.py --device cuda --size vitg --frames 64 --dtype bfloat16 --json",
        "vjepa2.py --device cpu --size mid --frames 4 --calls 1 --json",
    ),
    "vjepa2_ac": (
        "vjepa2_ac.py --device cuda --case full --calls 2 --json",
        "vjepa2_ac.py --horizons 2 --plans 40x1x2 --calls 1 --json",
    ),
    "bagel": ("gpu_models.py bagel", "gpu_models.py bagel --device cpu --tiny"),
    "qwen3_omni": (QWEN, "qwen3_omni.py --streams 1 --rounds 1 --json"),
    "bagel beside plain loops": (
        f"{LOOPS} --device cuda --case full --timesteps 9 --tokens 32 --batches 1 4",
        f"{LOOPS} --device cpu --case tiny --timesteps 4 --tokens 8 --batches 1",
    ),
    "orpheus, compiled transformers": (
        "gpu_models.py compiled",
        "gpu_models.py compiled --device cpu --tiny",
    ),
}


class Failed(Exception):
    """A part did not come to its end; what it had printed until then."""

    def __init__(self, why: str, printed: str) -> None:
        super().__init__(why)
        self.printed = printed


def run(arguments: list[str], limit: float) -> str:
    """What a program of this folder prints, in a process group that ends with it.

    Raises:
        Failed: it fails, or takes longer than `limit` seconds.
    """
    command = [sys.executable, str(HERE / arguments[0]), *arguments[1:]]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            printed, errors = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            printed, _ = child.communicate()
            raise Failed(f"took longer than {limit:.0f} s", printed) from None
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    if child.returncode:
        said = errors.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise Failed(said[0][:300], printed)
    return printed


def parsed(printed: str) -> Any:
    """JSON, or JSON objects one a line; of a program that was stopped, as far as it came."""
    try:
        return json.loads(printed)
    except ValueError:
        pass
    found = []
    for line in printed.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


class Report:
    """What was found, what failed, and how much time is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.ends = time.monotonic() + LIMIT
        self.failed: dict[str, str] = {}

    def part(self, name: str, arguments: list[str], limit: float) -> Any:
        """What a part printed."""
        left = self.ends - time.monotonic()
        if left < 5:
            self.failed[name] = "no time was left"
            return []
        began = time.monotonic()
        try:
            printed = run(arguments, min(limit, left))
        except Failed as error:
            self.failed[name], printed = str(error), error.printed
        self.say(f"{name}: {self.failed.get(name, 'done')}, {time.monotonic() - began:.0f} s")
        return parsed(printed)

    def keep(self, found: dict[str, Any]) -> None:
        """Write what there is so far: whoever runs this may stop it."""
        args = self.args
        if args.out or args.device == "cuda":
            slug = re.sub(r"\W+", "-", found["gpu"]).strip("-").lower()
            out = args.out or HERE / "results" / f"{slug}-{found['date']}.json"
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({**found, "failed": self.failed}, indent=1) + "\n")

    def say(self, line: str) -> None:
        print(line, file=sys.stderr if self.args.json else sys.stdout, flush=True)

    def make(self) -> dict[str, Any]:
        """The whole of it."""
        args, found = self.args, about(self.args.device)
        common = ["--device", args.device, *(["--tiny"] if args.tiny else [])]
        limits = self.part("ceilings", ["gpu.py", "--part", "ceilings", *common], 60)
        found["ceilings"] = limits if isinstance(limits, dict) else {}
        if found["ceilings"]:
            self.say("  " + ", ".join(f"{k} {v:.3e}" for k, v in found["ceilings"].items()))
        if not args.models and found["ceilings"]:
            job = ["gpu.py", "--part", "kernels", *common, *(["--tune"] if args.tune else [])]
            job += ["--ceilings", json.dumps(found["ceilings"])]
            rows = self.part("kernels", job, KERNELS_LIMIT)
            found["kernels"] = rows if isinstance(rows, list) else [rows]
            for row in found["kernels"]:
                if "error" in row:
                    self.failed[row["name"]] = row["error"]
                elif row["differs_by"] > WRONG:
                    self.failed[row["name"]] = f"differs from torch by {row['differs_by']:.0e}"
                self.say(line_of(row))
            self.keep(found)
        if not args.kernels:
            found["models"] = {}
            for name in MODELS:
                found["models"][name] = self.model(name, found["ceilings"])
                self.keep(found)
        return {**found, "failed": self.failed}

    def model(self, name: str, ceilings: dict[str, float]) -> Any:
        """The figures of a model."""
        command = MODELS[name][self.args.tiny].format(
            peak=ceilings.get("flops_per_s", 0) / 1e12,
            bandwidth=ceilings.get("bytes_per_s", 0) / 1e12,
        )
        program, *rest = command.split()
        if not (HERE / program).is_file():
            self.failed[name] = f"there is no {program}"
            return []
        figures = self.part(name, [program, *rest], MODEL_LIMIT)
        self.say("  " + json.dumps(figures))
        return figures


def line_of(row: dict[str, Any]) -> str:
    """A row of the table of kernels."""
    if "error" in row:
        return f"  {row['name']:64} {row['error']}"
    return (
        f"  {row['name']:64} {row['us']:10.1f} us {row['ratio']:6.2f}x torch"
        f" {row['of_ceiling']:5.0%} of {row['ceiling']:5}  differs by {row['differs_by']:.0e}"
    )


def about(device: str) -> dict[str, Any]:
    """Which machine, when, and with what."""
    from mstar.engine.kernels.dispatch import triton

    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none: CPU, for a try",
        "date": datetime.date.today().isoformat(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
    }


def part(args: argparse.Namespace) -> None:
    """One part, in this process: it prints JSON."""
    from gpu_kernels import rows
    from gpu_measure import Clock, ceilings

    clock = Clock(torch.device(args.device))
    if args.part == "ceilings":
        print(json.dumps(ceilings(clock, tiny=args.tiny)))
        return
    for row in rows(clock, json.loads(args.ceilings), tiny=args.tiny, tune=args.tune):
        print(json.dumps(row), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--kernels", action="store_true", help="only these")
    which.add_argument("--models", action="store_true", help="only these")
    parser.add_argument("--tune", action="store_true", help="keep the tiles that were fastest")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--out", type=Path, help="where to keep them")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to try the program")
    parser.add_argument("--part", choices=("ceilings", "kernels"), help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu only tries the program: give --tiny with it")
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "this benchmark needs a CUDA GPU, and torch sees none; "
            "--device cpu --tiny tries the program without one",
            file=sys.stderr,
        )
        return 2
    if args.part:
        part(args)
        return 0
    report = Report(args).make()
    if args.json:
        print(json.dumps(report, indent=1))
    for name, why in report["failed"].items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
