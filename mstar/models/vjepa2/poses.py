"""Poses of an end effector: x, y, z, the angles roll, pitch, yaw, and how closed the gripper is.

Angles are extrinsic x-y-z Euler angles in radians: R = Rz(yaw) Ry(pitch) Rx(roll).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["trajectory"]


def trajectory(pose: Tensor, actions: Tensor) -> Tensor:
    """Poses `[samples, steps + 1, 7]`: one `[samples or 1, 7]`, and those after each of the actions
    `[samples, steps, 7]`, with canonical angles: |pitch| <= pi / 2. Computed in float64."""
    first = pose.expand(len(actions), 7).unsqueeze(1)
    if not actions.shape[1]:
        return first
    before, changes = pose.double(), actions.double()
    turns, turned, grips = _matrix(changes[..., 3:6]), [_matrix(before[:, 3:6])], [before[:, 6]]
    for step in range(actions.shape[1]):
        turned.append(turns[:, step] @ turned[-1])
        grips.append((grips[-1] + changes[:, step, 6]).clamp(0, 1))
    position = before[:, None, :3] + changes[..., :3].cumsum(1)
    angles, gripper = _angles(torch.stack(turned[1:], 1)), torch.stack(grips[1:], 1).unsqueeze(-1)
    return torch.cat([first, torch.cat([position, angles, gripper], -1).to(pose.dtype)], 1)


def _matrix(angles: Tensor) -> Tensor:
    """Rotation matrices `[..., 3, 3]` of angles `[..., 3]`."""
    (a, b, c), (sa, sb, sc) = angles.cos().unbind(-1), angles.sin().unbind(-1)
    rows = (
        *(c * b, c * sb * sa - sc * a, c * sb * a + sc * sa),
        *(sc * b, sc * sb * sa + c * a, sc * sb * a - c * sa),
        *(-sb, b * sa, b * a),
    )
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def _angles(r: Tensor) -> Tensor:
    """Angles `[..., 3]` of rotation matrices `[..., 3, 3]`."""
    roll = torch.atan2(r[..., 2, 1], r[..., 2, 2])
    pitch = torch.atan2(-r[..., 2, 0], torch.hypot(r[..., 0, 0], r[..., 1, 0]))
    yaw = torch.atan2(r[..., 1, 0], r[..., 0, 0])
    return torch.stack([roll, pitch, yaw], -1)
