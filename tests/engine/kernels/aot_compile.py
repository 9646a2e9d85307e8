"""Compiles every Triton kernel for real GPUs, with none present. Prints one JSON line per result.

Run as ``python aot_compile.py 80 90 120`` (compute capabilities), outside Triton's interpreter.
A line: {"kernel", "variant", "arch", "shared" (bytes per program) or "error"}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mstar.engine.kernels import (
    ada_norm,
    gated,
    guided_euler,
    paged_decode,
    paged_extend,
    rms_norm,
    rotary_store,
)

_ATTENTION = {
    "query_start": "*i32",
    "kv_lens": "*i32",
    "causal": "*i32",
    "block_table": "*i32",
    "partial": "*fp32",
    "log_sums": "*fp32",
    "scale_log2": "fp32",
}


def _attention(dtype: str, dim: int, block_n: int, **more: Any) -> dict[str, Any]:
    return {
        **_ATTENTION,
        **dict.fromkeys(("q", "k_pages", "v_pages", "out"), f"*{dtype}"),
        "DIM": dim,
        "BLOCK_D": dim,
        "BLOCK_N": block_n,
        "PAGE_SIZE": 16,
        "GROUP": 3,
        "num_warps": 4 if block_n == 64 else 8,
        "num_stages": 2,
        **more,
    }


def _decode(dtype: str, dim: int, block_n: int, splits: int) -> dict[str, Any]:
    more = {"KV_HEADS": 8, "SPLITS": splits, "LIMIT": 16, "MIN_CHUNK": 256, "BLOCK_G": 16}
    values = _attention(dtype, dim, block_n, **more)
    return values if splits > 1 else values | {"partial": f"*{dtype}"}


def _plain(dtype: str, **more: Any) -> dict[str, Any]:
    """Arguments of the kernels that move rows: every tensor has the dtype unless named here."""
    names = ["x", "residual", "weight", "out", "total", "gate_up", "qkv", "k_pages", "v_pages"]
    names += ["query_norm", "key_norm", "added"]
    named = {"cos": "*fp32", "sin": "*fp32", "slots": "*i64", "eps": "fp32"}
    return {**dict.fromkeys(names, f"*{dtype}"), **named, "num_warps": 4, **more}


_ROTARY = {"HEADS": 24, "KV_HEADS": 8, "HALF": 64, "PAGE_SIZE": 16, "BLOCK_HEADS": 16, "BLOCK": 64}
_NORM = {"HIDDEN": 3072, "BLOCK": 4096, "ROWS": 1}
_ADAPTIVE = {"WIDTH": 1024, "BLOCK": 1024, **dict.fromkeys(("scale", "shift", "gate"), "*fp32")}
_GUIDED = {
    **dict.fromkeys(("x", "velocities", "table", "out"), "*fp32"),
    **{"places": "*i32", "TINY": 1e-8, "DIM": 64, "BLOCK": 64, "ROWS": 64, "num_warps": 8},
}
_COMBINE = {"HEADS": 24, "DIM": 128, "SPLITS": 16, "BLOCK_S": 16, "BLOCK_D": 128, "num_warps": 4}

# (kernel, variant, {argument: constant, or type of a tensor or float}); the rest are int32.
KERNELS: list[tuple[Any, str, dict[str, Any]]] = [
    (rms_norm._rms_norm_kernel, "bf16 fused", _plain("bf16", FUSED=True, **_NORM)),
    (rms_norm._rms_norm_kernel, "fp32", _plain("fp32", FUSED=False, **_NORM)),
    (ada_norm._ada_norm_kernel, "bf16 fused", _plain("bf16", FUSED=True, **_ADAPTIVE)),
    (ada_norm._ada_norm_kernel, "fp32", _plain("fp32", FUSED=False, **_ADAPTIVE)),
    (guided_euler._guided_euler_kernel, "fp32", _GUIDED),
    (gated._gated_kernel, "bf16 silu", _plain("bf16", SILU=True, BLOCK=1024)),
    (gated._gated_kernel, "bf16 gelu", _plain("bf16", SILU=False, BLOCK=1024)),
    (rotary_store._rotary_store_kernel, "bf16", _plain("bf16", NORMED=False, **_ROTARY)),
    (rotary_store._rotary_store_kernel, "fp32", _plain("fp32", NORMED=False, **_ROTARY)),
    (rotary_store._rotary_store_kernel, "bf16 normed", _plain("bf16", NORMED=True, **_ROTARY)),
    (paged_extend._extend_kernel, "bf16", _attention("bf16", 128, 64, BLOCK_M=64)),
    (paged_extend._extend_kernel, "bf16 wide", _attention("bf16", 256, 32, BLOCK_M=64)),
    (paged_extend._extend_kernel, "fp32", _attention("fp32", 128, 32, BLOCK_M=64)),
    (paged_decode._decode_kernel, "bf16 split", _decode("bf16", 128, 64, splits=16)),
    (paged_decode._decode_kernel, "bf16", _decode("bf16", 128, 64, splits=1)),
    (paged_decode._decode_kernel, "fp32 split", _decode("fp32", 128, 32, splits=16)),
    (paged_decode._combine_kernel, "bf16", _ATTENTION | {"out": "*bf16"} | _COMBINE),
]


def compile_kernel(kernel: Any, values: dict[str, Any], arch: int) -> int:
    """Compile for one architecture; the shared memory of a program in bytes."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values.get(name, "i32")
        if isinstance(value, str):
            signature[name] = value
            # What a launch sees: aligned tensors, strides that are multiples of 16.
            if value.startswith("*") or name.endswith("stride"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = value
    options = {key: values[key] for key in ("num_warps", "num_stages") if key in values}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return compiled.metadata.shared


def main() -> None:
    for arch in map(int, sys.argv[1:]):
        for kernel, variant, values in KERNELS:
            result = {"kernel": kernel.__name__, "variant": variant, "arch": arch}
            try:
                result["shared"] = compile_kernel(kernel, values, arch)
            except Exception as error:
                result["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
