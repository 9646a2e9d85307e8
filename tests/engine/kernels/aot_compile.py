"""Compiles every Triton kernel for real GPUs, with none present. Prints one JSON line per result.

Run as ``python aot_compile.py 90 80 120`` (compute capabilities), outside Triton's interpreter.
A line: {"kernel", "variant", "arch", "shared" (bytes per program), "stack" (bytes per thread, which
registers did not hold)}, or "error" instead of the last two. The first capability gets every
variant; to save time the others get the first one of each kernel, and those in float32, whose tiles
are the largest.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from multiprocessing import Pool
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mstar.engine.kernels import (
    ada_norm,
    codec_conv,
    expert_blocks,
    gated,
    grouped_experts,
    guided_euler,
    l1_cost,
    layer_norm,
    matvec,
    paged_decode,
    paged_extend,
    paged_shared,
    paged_tiles,
    pair_rotary,
    quantize_rows,
    resize,
    rms_norm,
    rotary_store,
    route,
    sample_cut,
    sample_fused,
    scaled_product,
    snake,
)

_ATTENTION = {
    "query_start": "*i32",
    "kv_lens": "*i32",
    "causal": "*i32",
    "block_table": "*i32",
    "partial": "*fp32",
    "log_sums": "*fp32",
    "scale_log2": "fp32",
    "FEW_KEYS": 512,
}
_DECODE = {"few": None, "shared": "*i32", "QUERIES": 1, "TOGETHER": 4, "BLOCK_G": 16}
_DECODE_FEW = {"few": "*i32", "shared": None, "QUERIES": 8, "TOGETHER": 1}


def _attention(kernel: str, dtype: str, dim: int, group: int = 3, **more: Any) -> dict[str, Any]:
    """With the tile of a GPU that was not measured."""
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    q, pages = torch.empty(1, 8 * group, dim, dtype=kind), torch.empty(1, 16, 8, dim, dtype=kind)
    return {
        **_ATTENTION,
        **dict.fromkeys(("q", "k_pages", "v_pages", "out"), f"*{dtype}"),
        **{"DIM": dim, "BLOCK_D": dim, "BLOCK_N": paged_tiles.block_keys(q), "PAGE_SIZE": 16},
        **{"GROUP": group, "MIN_CHUNK": 256},
        **paged_tiles.tiles(kernel, q, pages)[1][0],
        **more,
    }


def _plain(dtype: str, **more: Any) -> dict[str, Any]:
    """Arguments of the kernels that move rows: every tensor has the dtype unless named here."""
    names = ["x", "residual", "weight", "out", "total", "gate_up", "qkv", "k_pages", "v_pages"]
    names += ["query_norm", "key_norm", "added", "bias", "alpha", "inverse"]
    named = {"cos": "*fp32", "sin": "*fp32", "slots": "*i64", "eps": "fp32"}
    return {**dict.fromkeys(names, f"*{dtype}"), **named, "num_warps": 4, **more}


_ROTARY = {"HEADS": 24, "KV_HEADS": 8, "HALF": 64, "PAGE_SIZE": 16, "BLOCK_HEADS": 16, "BLOCK": 64}
_NORM = {"HIDDEN": 3072, "BLOCK": 4096, "ROWS": 1}
_ADAPTIVE = {"WIDTH": 1024, "BLOCK": 1024, **dict.fromkeys(("scale", "shift", "gate"), "*fp32")}
_GUIDED = {
    **dict.fromkeys(("x", "velocities", "table", "out"), "*fp32"),
    **{"places": "*i32", "TINY": 1e-8, "DIM": 64, "BLOCK": 64, "ROWS": 64, "num_warps": 8},
}
_L1 = {"WIDTH": 1408, "BLOCK": 2048, "ROWS": 4, "TOKENS": 32, "NORMED": True, "num_warps": 8}
_ROUTE = {
    **{"logits": "*bf16", "weights": "*fp32", "experts": "*i64", "num_warps": 1},
    **{"COUNT": 128, "BLOCK": 128, "TOP_K": 8, "PLACES": 8, "NORMALISE": True},
}
_BLOCKS = {
    **{"experts": "*i64", "rows": "*i32", "owner": "*i32"},
    **{"COUNT": 128, "SIZE": 16, "BINS": 256, "CHUNK": 1024, "num_warps": 4},
}
_PAIRS = {"own": "*fp32", "other": "*fp32", "DIM": 64, "BLOCK_D": 64, "BLOCK_H": 32}
_MATVEC = {"ROWS": 1, "BLOCK_M": 1, "BY_LANE": True, "BIASED": True, **matvec._LANES[0]}
_ROWS = {"ROWS": 8, "BLOCK_M": 16, "BY_LANE": False, "BIASED": False, **matvec._UNITS[0]}
_DEPTHWISE = {"TAPS": 7, "STEPS": 16, "CHANNELS": 64}
_MEANS = dict.fromkeys(
    (f"{c}_{of}" for c in ("red", "green", "blue") for of in ("mean", "std")), "fp32"
)
_CODEC = {
    **dict.fromkeys(("x", "weight", "bias", "added", "alpha", "inverse", "out", "active"), "*fp32"),
    **{"ADDED": True, "ACTIVE": True},
}
_RESIZE = {"x": "*u8", "table": "*i32", "out": "*u8", "NORMAL": False, "BLOCK": 1024, **_MEANS}
_COMBINE = {"out": "*bf16", "DIM": 128, "SPLITS": 16, "BLOCK_D": 128, "num_warps": 4}
_SHARED = {"shared": "*i32", "TOGETHER": 4, "PAGE_SIZE": 16, "BLOCK": 1024, "num_warps": 4}


def _grouped(dtype: str, size: int, choice: dict[str, int], **more: Any) -> dict[str, Any]:
    """Qwen3-Omni's experts: 768 inside 2048."""
    tensors = dict.fromkeys(("x", "matrices", "out"), f"*{dtype}")
    tensors |= {"matrix_scales": None, "rows": "*i32", "owner": "*i32", "scales": "*fp32"}
    sizes = {"TOP_K": 8, "K": 2048, "N": 768, "COUNT": 128, "BLOCK_M": size}
    return {**tensors, **sizes, "ALONE": False, "GATED": True, **choice, **more}


def _scaled(x: str, weight: str, **more: Any) -> dict[str, Any]:
    tensors = {"x": f"*{x}", "weight": f"*{weight}", "scales": "*fp32", "out": "*bf16"}
    tile = {"BLOCK_M": 16, **scaled_product._TILES[0]}
    return {**tensors, "bias": "*bf16", "x_scales": None, **tile, **more}


_INT8 = {"matrix_scales": "*fp32", "matrices": "*i8"}
_E4M3_ROWS = {"x_scales": "*fp32", "bias": None, "BLOCK_M": 64, **scaled_product._TILES[2]}
_E4M3 = {"matrix_scales": "*fp32", "matrices": "*fp8e4nv"}
_BYTES = {"x": "*bf16", "values": "*u8", "scales": "*fp32", "WIDTH": 3072, "BLOCK": 4096}
_SAMPLE = {
    **dict.fromkeys(("logits", "extents"), "*fp32"),
    **dict.fromkeys(("temperatures", "top_ps", "min_ps", "scores"), "*fp64"),
    **dict.fromkeys(("top_ks", "keys", "bins", "listed", "cuts", "tokens", "slots"), "*i64"),
    **dict.fromkeys(("repetitions", "presences", "frequencies"), "*fp64"),
    **dict.fromkeys(("bests", "winners", "in_output"), "*i32"),
    **{"in_prompt": "*u8", "counted": "*i64", "BINS": sample_cut._BINS, "PLACES": 256},
    **{"UNIT": 2.0**44, "BLOCK": sample_fused._BLOCK, "SPAN": sample_cut._SPAN, "num_warps": 4},
    **{"CUT": True, "GREEDY": False, "COUNT": True, "WAYS": sample_cut._WAYS},
}
_TILES = codec_conv._TILES
_CUT = {"BLOCK": sample_cut._SCAN, "num_warps": 8}
_NO_TABLES = dict.fromkeys(("in_prompt", "in_output", "slots"))
_NO_TABLES |= dict.fromkeys(("repetitions", "presences", "frequencies", "counted"))
_ALONE = {"ALONE": True, "rows": "*i64", "owner": "*i64"}
_FEW, _MANY = grouped_experts._FEW[0], grouped_experts._MANY[0]
_SINGLE = grouped_experts._SINGLE[0]

# (kernel, variant, {argument: constant, or type of a tensor or float}); the rest are int32.
KERNELS: list[tuple[Any, str, dict[str, Any]]] = [
    (rms_norm._rms_norm_kernel, "bf16 fused", _plain("bf16", FUSED=True, **_NORM)),
    (ada_norm._ada_norm_kernel, "bf16 fused", _plain("bf16", FUSED=True, **_ADAPTIVE)),
    (guided_euler._guided_euler_kernel, "fp32", _GUIDED),
    (gated._gated_kernel, "bf16 silu", _plain("bf16", SILU=True, BLOCK=1024)),
    (gated._gated_kernel, "bf16 gelu", _plain("bf16", SILU=False, BLOCK=1024)),
    (rotary_store._rotary_store_kernel, "bf16 normed", _plain("bf16", NORMED=True, **_ROTARY)),
    (pair_rotary._pair_rotary_kernel, "bf16", _plain("bf16", **_PAIRS)),
    (paged_extend._extend_kernel, "bf16", _attention("paged_extend", "bf16", 128)),
    (paged_extend._extend_kernel, "fp32", _attention("paged_extend", "fp32", 128)),
    (paged_extend._extend_kernel, "fp32 wide", _attention("paged_extend", "fp32", 256)),
    (paged_extend._extend_kernel, "small heads", _attention("paged_extend", "fp32", 64)),
    (paged_decode._decode_kernel, "bf16", _attention("paged_decode", "bf16", 128, **_DECODE)),
    (
        paged_decode._decode_kernel,
        "fp32 wide",
        _attention("paged_decode", "fp32", 256, **_DECODE),
    ),
    (
        paged_decode._decode_kernel,
        "bf16 few",
        _attention("paged_decode_few", "bf16", 128, 8, BLOCK_G=64, **_DECODE_FEW),
    ),
    (
        paged_decode._decode_kernel,
        "fp32 few",
        _attention("paged_decode_few", "fp32", 128, 4, BLOCK_G=32, **_DECODE_FEW),
    ),
    (paged_decode._combine_kernel, "bf16", _ATTENTION | _COMBINE | {"few": None, "QUERIES": 1}),
    (paged_decode._combine_kernel, "bf16 few", _ATTENTION | _COMBINE | _DECODE_FEW),
    (paged_shared._shared_kernel, "", _ATTENTION | _SHARED),
    (
        l1_cost._l1_cost_kernel,
        "bf16",
        _plain("bf16", predicted="*bf16", goal="*bf16", sums="*fp32", **_L1),
    ),
    (layer_norm._layer_norm_kernel, "bf16 fused", _plain("bf16", FUSED=True, **_NORM)),
    (matvec._matvec_kernel, "bf16 1 row", _plain("bf16", **_MATVEC)),
    (matvec._matvec_kernel, "bf16 8 rows", _plain("bf16", **_ROWS)),
    (snake._snake_kernel, "fp32", _plain("fp32", BLOCK=1024)),
    (snake._depthwise_snake_kernel, "fp32", _plain("fp32", **_DEPTHWISE)),
    (codec_conv._codec_conv_kernel, "dilated", _CODEC | {"TAPS": 7, "RATE": 1} | _TILES[1]),
    (codec_conv._codec_conv_kernel, "upsampling", _CODEC | {"TAPS": 2, "RATE": 5} | _TILES[0]),
    (resize._resize_kernel, "bf16", _RESIZE | {"out": "*bf16", "NORMAL": True}),
    (resize._resize_kernel, "bytes", _RESIZE),
    # The first of each runs on every GPU; e4m3 needs capability 8.9.
    (quantize_rows._quantize_rows_kernel, "bf16", _BYTES),
    (scaled_product._scaled_product_kernel, "int8", _scaled("bf16", "i8")),
    (scaled_product._scaled_product_kernel, "e4m3", _scaled(*["fp8e4nv"] * 2, **_E4M3_ROWS)),
    (route._route_kernel, "bf16", _ROUTE),
    (expert_blocks._expert_blocks_kernel, "", _BLOCKS),
    (sample_fused._begin_kernel, "penalties", _SAMPLE),
    (sample_fused._begin_kernel, "plain", _SAMPLE | _NO_TABLES),
    (sample_fused._race_kernel, "", _SAMPLE),
    (sample_fused._finish_kernel, "counted", _SAMPLE),
    (
        sample_fused._finish_kernel,
        "greedy",
        _SAMPLE | _NO_TABLES | {"GREEDY": True, "COUNT": False, "temperatures": None},
    ),
    (sample_cut._fill_kernel, "", _SAMPLE),
    (sample_cut._list_kernel, "", _SAMPLE),
    (sample_cut._cut_kernel, "", _SAMPLE | _CUT),
    (grouped_experts._grouped_kernel, "bf16 many", _grouped("bf16", 128, _MANY)),
    (grouped_experts._grouped_kernel, "bf16 alone", _grouped("bf16", 16, _FEW, **_ALONE)),
    (grouped_experts._grouped_kernel, "fp32", _grouped("fp32", 32, _SINGLE)),
    (grouped_experts._grouped_kernel, "e4m3", _grouped("bf16", 16, _FEW, **_E4M3)),
    (grouped_experts._grouped_kernel, "down", _grouped("bf16", 128, _MANY, GATED=False)),
    (
        grouped_experts._grouped_kernel,
        "down, int8, alone",
        _grouped("bf16", 16, _FEW, GATED=False, **_INT8, **_ALONE),
    ),
]


def compile_kernel(kernel: Any, values: dict[str, Any], arch: int) -> dict[str, int]:
    """Compile for one architecture; what the kernel takes."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values.get(name, "i32")
        if isinstance(value, str):
            signature[name] = value
            # What a launch mostly sees: aligned tensors, sizes that are multiples of 16.
            if value[0] in "*i" and name not in kernel.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = value
    options = {key: values[key] for key in ("num_warps", "num_stages") if key in values}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with NamedTemporaryFile() as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack = int(re.search(r"STACK:(\d+)", used).group(1))
    return {"shared": compiled.metadata.shared, "stack": stack}


def _result(task: tuple[int, int]) -> dict[str, Any]:
    arch, index = task
    kernel, variant, values = KERNELS[index]
    result = {"kernel": kernel.__name__, "variant": variant, "arch": arch}
    try:
        return result | compile_kernel(kernel, values, arch)
    except Exception as error:
        return {**result, "error": f"{type(error).__name__}: {error}"}


def main() -> None:
    every, *others = map(int, sys.argv[1:])
    first = {kernel.__name__: i for i, (kernel, *_) in reversed(list(enumerate(KERNELS)))}
    some = {*first.values(), *(i for i, row in enumerate(KERNELS) if "fp32" in row[1])}
    tasks = [(every, i) for i in range(len(KERNELS))]
    tasks += [(arch, i) for arch in others for i in some]
    with Pool(min(4, os.cpu_count() or 1)) as pool:
        for result in pool.imap_unordered(_result, tasks):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
