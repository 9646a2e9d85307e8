"""From a registry target to a loaded model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from mstar.engine.hub import resolve
from mstar.engine.kernels.dispatch import triton
from mstar.engine.layers.quantized import Quantization, check_quantization
from mstar.errors import InvalidRequest, ModelNotFound
from mstar.models.base import Model, Setup
from mstar.models.registry import Target

__all__ = ["device_for", "dtype_for", "load_model"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONFIGS = ("*.json", "*.model", "*.txt", "*.jinja")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def load_model(
    target: Target,
    *,
    device: torch.device,
    dtype: str | torch.dtype | None,
    load_format: str,
    progress: bool | None,
    quantization: str | None = None,
    **options: Any,
) -> Model:
    """Fetch what has to be fetched, and load it.

    Raises:
        InvalidRequest: an option is wrong. ModelNotFound, WeightsError: as they say.
    """
    if load_format not in ("auto", "dummy"):
        raise InvalidRequest("load_format", load_format, "must be 'auto' or 'dummy'")
    dummy = load_format == "dummy"
    bar = _ProgressBar() if (sys.stderr.isatty() if progress is None else progress) else None
    model_class = target.card.load_class()
    for name in options.get("options", ()):
        if name not in model_class.options:
            allowed = ", ".join(model_class.options) or "none"
            raise InvalidRequest("options", name, f"{target.card.name} has {allowed}")
    if quantization is not None:
        check_quantization(quantization, device)
        if not model_class.quantized:
            allowed = f"{target.card.name} has no layers that can be quantised"
            raise InvalidRequest("quantization", quantization, allowed)
        quantization = Quantization(quantization, model_class.quantized)
    setup = Setup(
        folders=_folders(target, dummy, bar is not None),
        device=device,
        dtype=dtype_for(dtype, device),
        dummy=dummy,
        quantization=quantization,
        progress=bar,
        **options,
    )
    try:
        with torch.inference_mode():
            model = model_class.load(setup)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams will read what was loaded
        return model
    finally:
        if bar is not None:
            bar.close()


def device_for(device: str | torch.device | None) -> torch.device:
    """The device that is meant; the GPU if there is one and none is named."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidRequest("device", device, "must be 'cpu', 'cuda' or 'cuda:N'") from error
    if found.type not in ("cpu", "cuda"):
        raise InvalidRequest("device", device, "must be 'cpu', 'cuda' or 'cuda:N'")
    if found.type == "cpu":
        return torch.device("cpu")
    if (found.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest("device", device, f"{torch.cuda.device_count()} GPUs are to be seen")
    if triton is None:
        raise InvalidRequest("device", device, "a GPU needs Triton: pip install 'triton>=3.6'")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def dtype_for(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The run dtype that is meant; bfloat16 on a GPU and float32 on a CPU if none is named."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise InvalidRequest("dtype", dtype, f"must be one of {', '.join(_DTYPES)}")
    return found


def _folders(target: Target, dummy: bool, progress: bool) -> dict[str, Path]:
    """A local folder for each part. Dummy models fall back on the configs in the package."""
    folders = {}
    for part, source in target.sources.items():
        is_hub_default = source == target.card.repos[part]
        if dummy and is_hub_default:
            if target.card.full is None:
                raise ModelNotFound(f"{target.card.name} has no built-in configs for dummy weights")
            folders[part] = target.card.full / part
            continue
        patterns = _CONFIGS if dummy else _CONFIGS + _WEIGHTS
        folders[part] = resolve(source, patterns=patterns, progress=progress)
    return folders


class _ProgressBar:
    """A bar on stderr that follows the tensors being read."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, done: int, total: int, name: str) -> None:
        from tqdm import tqdm

        if self._bar is None or self._bar.total != total:
            self.close()
            self._bar = tqdm(
                total=total, desc="loading", unit="tensor", file=sys.stderr, leave=False
            )
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
