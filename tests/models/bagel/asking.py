"""The published cases as requests of an Engine."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).parents[2] / "data" / "bagel"


def file_of(name):
    return (DATA / name).read_bytes()


def request_of(case):
    """A case of goldens.json as arguments of `generate`."""
    if case["kind"] == "text_out":
        asked = {"text": case["text"], "think": case["think"]}
        if case["image"]:
            asked["images"] = [file_of(case["image"])]
        # The published limit counts the start token, and its last step is dropped.
        return {**asked, "max_output_tokens": case["max_think_token_n"] - 1}
    params = dict(case["params"])
    height, width = params.pop("image_shapes", (None, None))
    params.pop("max_think_token_n", None)
    # Where a case leaves out the scale, it means that of the published class, not of the demo.
    params.setdefault("cfg_text_scale", 3.0)
    asked = {"seed": case["seed"], "height": height, "width": width, **params}
    if case.get("max_think_token_n"):
        asked["max_think_tokens"] = case["max_think_token_n"]
    if "input_list" in case:
        parts = [
            {"type": "image", "image": file_of(item)}
            if item.endswith(".png")
            else {"type": "text", "text": item}
            for item in case["input_list"]
        ]
        asked["messages"] = [{"role": "user", "content": parts}]
    else:
        asked["text"] = case["text"]
        if case["image"]:
            asked["images"] = [file_of(case["image"])]
    return {**asked, "output_modalities": ("image",)}


def levels(png):
    """The bytes `[height, width, 3]` of a PNG."""
    return np.array(Image.open(io.BytesIO(png)))


def assert_same_picture(found, expected):
    """At most one level apart, and that in few places: the tolerance of the goldens."""
    assert found.shape == expected.shape
    off = np.abs(found.astype(int) - expected.astype(int))
    assert off.max() <= 1
    assert (off > 0).mean() <= 0.002
