"""How many CPU threads the operations of one thread of ours use."""

from __future__ import annotations

import threading

import torch

__all__ = ["threads_for", "use_threads"]

# Below this many bytes of weights, waking a second thread costs more than it brings (measured with
# `orpheus-tiny` on 2 cores: twice the tokens per second with one).
_SMALL = 64 << 20


def threads_for(weight_bytes: int) -> int:
    """One thread for a small model, torch's own setting for others."""
    return 1 if weight_bytes < _SMALL else torch.get_num_threads()


def use_threads(count: int) -> None:
    """Let torch use `count` threads for what the calling thread runs, and nobody else.

    `torch.set_num_threads` also sets what threads that are started later begin with; that is put
    back by a thread of its own, whose own setting ends with it.
    """
    before = torch.get_num_threads()
    if before == count:
        return
    torch.set_num_threads(count)
    other = threading.Thread(target=torch.set_num_threads, args=(before,))
    other.start()
    other.join()
