"""ALOHA's joints as pi0.5 knows them: some turn the other way, and grippers are angles.

The robot tells how far its grippers are open, from 0 to 1; the model was trained on the angle of
the motor that opens them (openpi's `adapt_to_pi`).
"""

from __future__ import annotations

import numpy as np

__all__ = ["decode_actions", "encode_state"]

_SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2, np.float64)
_GRIPPERS = [6, 13]
_CLOSED, _OPEN = 0.01844, 0.058  # of the fingers, in metres
_HORN, _ROD = 0.022, 0.036  # of the crank that moves them, in metres
_MODEL = 0.5476, 1.6296  # angles of the model's grippers, closed and open
_ROBOT = -0.6213, 1.4910  # of the robot's, in radians


def encode_state(state: np.ndarray) -> np.ndarray:
    """Joints `[14]` of the robot to those of the model."""
    found = state * _SIGNS
    length = found[_GRIPPERS] * (_OPEN - _CLOSED) + _CLOSED
    sine = (_HORN**2 + length**2 - _ROD**2) / (2 * _HORN * length)
    angle = np.arcsin(np.clip(sine, -1.0, 1.0))
    found[_GRIPPERS] = (angle - _MODEL[0]) / (_MODEL[1] - _MODEL[0])
    return found


def decode_actions(actions: np.ndarray) -> np.ndarray:
    """Actions `[horizon, 14]` of the model to those of the robot."""
    found = actions * _SIGNS
    angle = found[:, _GRIPPERS] + _MODEL[0]
    found[:, _GRIPPERS] = (angle - _ROBOT[0]) / (_ROBOT[1] - _ROBOT[0])
    return found
