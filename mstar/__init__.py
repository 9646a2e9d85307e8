"""mstar: an embeddable engine for composite, any-to-any multimodal models.

Public names are imported on first use, so `import mstar` needs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mstar.client import AsyncMStarClient as AsyncMStarClient
    from mstar.client import MStarClient as MStarClient
    from mstar.errors import *  # noqa: F403
    from mstar.local import Engine as Engine
    from mstar.local import Handle as Handle
    from mstar.models.control.runner import PolicyRunner as PolicyRunner
    from mstar.models.pi05.policy import RobotPolicy as RobotPolicy
    from mstar.models.pi05.robots import Robot as Robot
    from mstar.types import *  # noqa: F403

__version__ = "0.1.0"

_HOME = {
    "mstar.client": ("AsyncMStarClient", "MStarClient"),
    "mstar.local": ("Engine", "Handle"),
    "mstar.models.pi05.policy": ("RobotPolicy",),
    "mstar.models.pi05.robots": ("Robot",),
    "mstar.models.control.runner": ("PolicyRunner",),
    "mstar.types": (
        "ActionChunk",
        "AudioBuffer",
        "AudioChunk",
        "Event",
        "GenerateResult",
        "ImageChunk",
        "LatentChunk",
        "ProgressChunk",
        "TextChunk",
        "Usage",
    ),
    "mstar.errors": (
        "ContextTooLong",
        "DeadlineExceeded",
        "EngineClosed",
        "EngineOverloaded",
        "InvalidRequest",
        "MStarError",
        "ModelNotFound",
        "OutOfMemory",
        "RequestCancelled",
        "RequestFailed",
        "RequestStopped",
        "RequestTimeout",
        "WeightsError",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mstar' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
