"""The one place that knows whether Triton is here and when a kernel runs through it.

Kernel files import ``triton``, ``tl`` and ``jit`` from this module and never Triton itself, so
every one of them imports on a machine without Triton; there, only calling a kernel is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # e.g. macOS: the torch paths are all there is
    triton = None
    tl = None

__all__ = ["jit", "next_power_of_2", "tl", "triton", "use_triton"]


def jit(function: Callable | None = None, *, varying: Sequence[str] = ()) -> Callable:
    """``triton.jit``, or the function itself where Triton is not installed.

    Args:
        varying: integers that are other ones at every launch, and tensors that may begin anywhere:
            nothing is compiled for some of them.
    """
    if function is None:
        return partial(jit, varying=varying)
    return function if triton is None else triton.jit(function, do_not_specialize=list(varying))


def use_triton(x: Tensor) -> bool:
    """True when a public kernel function should launch its Triton kernel for ``x``.

    That is: ``x`` lives on a CUDA device and Triton is installed. Tests run kernels in Triton's
    interpreter by calling the ``*_triton`` functions directly.
    """
    return x.is_cuda and triton is not None


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is >= ``n`` (``n`` >= 1)."""
    return 1 << (n - 1).bit_length()
