"""A robot for hours, in minutes: `get_action` at a fixed rate while everything changes.

    python benchmarks/pi05_soak.py [--calls 20000] [--rate 100] [--rtc guided|trained]

Cameras drop out, tasks change, episodes begin anew. Told at the end: jitter of the loop, how long
`get_action` took, starvations and how many of them no inference accounts for (none was running, or
an observation had just come), threads, and how memory and the number of objects went.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import threading
import time
from typing import Any

import numpy as np

from mstar import Engine, PolicyRunner

TASKS = ("pick up the cup", "fold the towel", "open the drawer and " * 8 + "close it")


class Watched:
    """A policy that notes when it infers."""

    def __init__(self, policy: Any) -> None:
        self._policy, self.running, self.ended = policy, False, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def begin(self, *args: Any, **kwargs: Any) -> Any:
        self.running = True
        try:
            pending = self._policy.begin(*args, **kwargs)
        except BaseException:
            self.over()
            raise
        result = pending.result

        def watched() -> Any:
            try:
                return result()
            finally:
                self.over()

        pending.result = watched
        return pending

    def over(self) -> None:
        self.ended, self.running = time.perf_counter(), False


def memory() -> float:
    """MiB in use by this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--rtc", choices=("guided", "trained"))
    args = parser.parse_args()
    dice = random.Random(0)
    images = np.random.default_rng(0).integers(0, 256, (8, 96, 128, 3), np.uint8)
    with Engine("pi05-tiny") as engine:
        policy = Watched(engine.policy())
        policy.warmup()
        cameras = list(policy.robot.images.values())
        with PolicyRunner(policy, args.rate, rtc=args.rtc) as runner:
            report(args, runner, policy, loop(args, runner, policy, dice, images, cameras))
    print(f"threads at the end: {[thread.name for thread in threading.enumerate()]}")


def loop(
    args: argparse.Namespace,
    runner: PolicyRunner,
    policy: Watched,
    dice: random.Random,
    images: np.ndarray,
    cameras: list[str],
) -> dict[str, Any]:
    """Run; what was seen on the way."""
    task, kept, resets, unexplained = TASKS[0], cameras, 0, 0
    periods, waits, sizes = [], [], []
    due = last = time.perf_counter()
    for call in range(args.calls):
        if dice.random() < 0.02:
            kept = dice.sample(cameras, dice.randint(1, len(cameras)))
        if dice.random() < 0.01:
            task = dice.choice(TASKS)
        if dice.random() < 0.005:
            runner.reset()
            resets += 1
        runner.notify(
            {
                **{camera: dice.choice(images) for camera in kept},
                "observation.state": [dice.uniform(-1, 1) for _ in range(8)],
                "task": task,
            }
        )
        starved = runner.stats["starvations"]
        began = time.perf_counter()
        action = runner.get_action()
        now = time.perf_counter()
        waits.append(now - began)
        if action is None and runner.stats["starvations"] > starved:
            unexplained += not policy.running and now - policy.ended > 0.005
        periods.append(began - last)
        last = began
        if call % max(1, args.calls // 10) == 0:
            gc.collect()
            sizes.append((memory(), len(gc.get_objects()), threading.active_count()))
        due += 1 / args.rate
        time.sleep(max(0.0, due - time.perf_counter()))
    gc.collect()
    sizes.append((memory(), len(gc.get_objects()), threading.active_count()))
    return {
        "periods": periods[1:],
        "waits": waits,
        "sizes": sizes,
        "resets": resets,
        "unexplained": unexplained,
    }


def report(
    args: argparse.Namespace, runner: PolicyRunner, policy: Watched, seen: dict[str, Any]
) -> None:
    stats = runner.stats
    for name in ("periods", "waits"):
        values = 1e3 * np.array(seen[name])
        quantiles = " ".join(f"p{q} {np.percentile(values, q):.3f}" for q in (50, 99, 99.9))
        print(f"{name}: {quantiles} max {values.max():.3f} ms")
    print(f"{stats}")
    print(f"resets {seen['resets']}, starvations unexplained by inference {seen['unexplained']}")
    for size, objects, threads in seen["sizes"]:
        print(f"  {size:.1f} MiB, {objects} objects, {threads} threads")
    print(f"engine: {policy.engine.stats()['requests']}, load {os.getloadavg()}")


if __name__ == "__main__":
    main()
