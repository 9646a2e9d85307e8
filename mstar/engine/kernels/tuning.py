"""Which tile sizes a kernel runs with, as data.

What was measured is a table of (kernel, shape) -> choice, one JSON file per GPU. Those that ship
are `tuned/<gpu>.json` beside this file: none yet, for no GPU was measured. What is not in them is
measured when it is first needed outside of a graph's capture, or more thoroughly by
`benchmarks/gpu.py --tune`, and kept in the user's cache folder, as
`$XDG_CACHE_HOME/mstar/tuned/<gpu>-triton-<version>.json`, from where it can be shipped as it is. A
file that cannot be read or written only costs the time to measure again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from mstar.engine.kernels.dispatch import triton

__all__ = ["Choice", "Table", "best", "fastest", "table_of"]

Choice = dict[str, int]  # what a kernel is launched with: constants, num_warps, num_stages
_SHIPPED = Path(__file__).with_name("tuned")
_log = logging.getLogger("mstar")
_lock = threading.RLock()


class Table:
    """What was measured on one GPU.

    Args:
        shipped: a file that is only read.
        own: a file of the user's, read first and added to.
    """

    def __init__(self, shipped: Path, own: Path) -> None:
        self._own = own
        self._added = _read(own)
        self._choices = {**_read(shipped), **self._added}

    def get(self, kernel: str, shape: str) -> Choice | None:
        """What was chosen; None if it was not measured."""
        return self._choices.get(f"{kernel} {shape}")

    def set(self, kernel: str, shape: str, choice: Choice) -> None:
        """Keep a choice, also on disk. Other processes may write the same file: the last one's
        additions win, and what they had added before is read again."""
        with _lock:
            self._choices[f"{kernel} {shape}"] = choice
            self._added = {**_read(self._own), **self._added, f"{kernel} {shape}": choice}
            fresh = self._own.with_name(f"{self._own.name}.{os.getpid()}")
            try:
                self._own.parent.mkdir(parents=True, exist_ok=True)
                fresh.write_text(json.dumps(self._added, indent=1, sort_keys=True))
                fresh.replace(self._own)
            except OSError as error:
                _log.info("tile sizes are not kept: %s", error)


def table_of(device: torch.device) -> Table:
    """The table of a CUDA device."""
    return _table(device.index if device.index is not None else torch.cuda.current_device())


def best(
    kernel: str,
    shape: str,
    choices: Sequence[Choice],
    run: Callable[[Choice], object],
    device: torch.device,
) -> Choice:
    """The fastest of some choices: as measured, now if it must be; the first where that is not
    possible (no GPU, or a graph is being captured).

    Args:
        kernel, shape: what the choice is for.
        run: launches the kernel as it will be launched, and nothing else.
    """
    if device.type != "cuda":
        return choices[0]
    table = table_of(device)
    found = table.get(kernel, shape)
    if found in choices:
        return found
    if torch.cuda.is_current_stream_capturing():
        return choices[0]
    with _lock:
        found = table.get(kernel, shape)  # another thread may have measured it by now
        if found not in choices:
            found = fastest(choices, run)
            if found is None:
                return choices[0]  # whose launch will say what is wrong
            table.set(kernel, shape, found)
    return found


def fastest(
    choices: Sequence[Choice],
    run: Callable[[Choice], object],
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> Choice | None:
    """The choice that takes the least time; those that do not fit the GPU are passed over.

    Args:
        clock: the time of a call; the median of many with cold caches, if left out.
    """
    times = []
    for choice in choices:
        try:
            times.append((clock or _milliseconds)(lambda choice=choice: run(choice)))
        except Exception as error:  # too much shared memory, say: another kind for every backend
            _log.debug("%s does not run: %s", choice, error)
            times.append(float("inf"))
    least = min(times)
    return None if least == float("inf") else choices[times.index(least)]


def _milliseconds(call: Callable[[], object]) -> float:
    return triton.testing.do_bench(call, warmup=5, rep=30, return_mode="median")


@cache
def _table(index: int) -> Table:
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(index)).strip("-").lower()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # a user without a home: a container's, say
        home = tempfile.gettempdir()
    own = Path(home) / "mstar" / "tuned" / f"{name}-triton-{triton.__version__}.json"
    return Table(_SHIPPED / f"{name}.json", own)


def _read(file: Path) -> dict[str, Choice]:
    try:
        choices = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): dict(choice) for key, choice in choices.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
