"""Plan what an arm has to do so that its camera sees the goal, and look at what is imagined.

    python examples/vjepa2_ac_plan.py [MODEL]

With the tiny checkpoint, whose weights are random, the numbers mean nothing.
"""

import sys

import numpy as np

from mstar import Engine

rng = np.random.default_rng(0)
camera, wanted = rng.integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
pose = np.array([0.4, 0.0, 0.3, 3.1, 0.0, 0.0, 0.0])  # x y z, roll pitch yaw, gripper

with Engine(sys.argv[1] if len(sys.argv) > 1 else "vjepa2_ac-tiny") as engine:
    context, goal = engine.encode(camera), engine.encode(wanted)  # once, for many plans
    plan = engine.plan(context, goal, pose, samples=50, horizon=3, iterations=5, seed=1)
    print("actions", plan.actions.round(3), sep="\n")
    print("best cost of each iteration", [round(float(costs.min()), 4) for costs in plan.costs])

    dream = engine.rollout(context, plan.actions, pose)
    for step, (latents, state) in enumerate(
        zip(dream.latents.numpy(), dream.states[1:], strict=True)
    ):
        far = np.abs(latents - goal.numpy()[0]).mean()
        print(f"after action {step}: at {state[:3].round(3)}, {far:.4f} from the goal")

    hurried = engine.plan(context, goal, pose, samples=400, iterations=100, budget_ms=300)
    print(f"within 300 ms: {len(hurried.costs)} iterations in {1e3 * hurried.seconds:.0f} ms")
