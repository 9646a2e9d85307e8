"""A simulated arm at 50 Hz: the control loop never waits for the policy.

    python examples/pi05_control_loop.py [seconds]

A real one differs in two lines: where observations come from, and where actions go.
"""

import sys
import time

import numpy as np

from mstar import Engine, PolicyRunner

FPS = 50


class Arm:
    """Seven joints that go where they are told to, and two cameras that see noise."""

    def __init__(self) -> None:
        self.joints = np.zeros(7)
        self.dice = np.random.default_rng(0)

    def observe(self) -> dict:
        cameras = self.dice.integers(0, 256, (2, 240, 320, 3), np.uint8)
        return {
            "observation.images.base_0_rgb": cameras[0],
            "observation.images.left_wrist_0_rgb": cameras[1],
            "observation.state": np.append(self.joints, 0.0),
            "task": "pick up the cup",
        }

    def move(self, action: np.ndarray) -> None:
        self.joints += 0.2 * (action - self.joints)


def main(seconds: float) -> None:
    arm = Arm()
    with Engine("pi05-tiny") as engine:
        policy = engine.policy()
        print(policy.warmup())
        with PolicyRunner(policy, fps=FPS, rtc=True) as runner:
            runner.notify(arm.observe())
            while (action := runner.get_action()) is None:
                time.sleep(0.001)
            ticks, due = [], time.perf_counter()
            for _ in range(round(seconds * FPS)):
                ticks.append(time.perf_counter())
                runner.notify(arm.observe())
                if action is not None:
                    arm.move(action)
                action = runner.get_action()
                due += 1 / FPS
                time.sleep(max(0.0, due - time.perf_counter()))
            stats = runner.stats
    periods = 1e3 * np.diff(ticks)
    off = np.abs(periods - 1e3 / FPS)
    print(f"period: mean {periods.mean():.2f} ms, p99 {np.percentile(periods, 99):.2f} ms")
    print(f"jitter: mean {off.mean():.2f} ms, p99 {np.percentile(off, 99):.2f} ms")
    print(f"inference: {stats['latency_ms']}")
    print(f"{stats['actions']} actions of {stats['chunks']} chunks, starved {stats['starvations']}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 3.0)
