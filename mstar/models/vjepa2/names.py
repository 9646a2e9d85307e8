"""Where parameters are in a checkpoint: in the hub's layout, or in the original one.

Our modules are called as in the original layout, with its wrappers' names left out. There queries,
keys and values are one matrix; the hub has them apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mstar.engine.weights import Source

__all__ = ["BLOCK", "POOLER_BLOCK", "sources"]

Names = Mapping[str, str | Sequence[str]]

# Module of a block -> its name in the hub's layout, or those of its parts.
BLOCK: Names = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": tuple(f"attention.{part}" for part in ("query", "key", "value")),
    "attn.proj": "attention.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
POOLER_BLOCK: Names = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": tuple(f"self_attn.{part}_proj" for part in "qkv"),
    "attn.proj": "self_attn.out_proj",
    "xattn.q": "cross_attn.q_proj",
    "xattn.kv": ("cross_attn.k_proj", "cross_attn.v_proj"),
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PATH = re.compile(r"(?P<block>\w*blocks\.\d+\.|cross_attention_block\.)?(?P<module>.*?)\.?(\w+)")


def sources(name: str, original: str, outside: Names, blocks: str, inside: Names) -> list[Source]:
    """Where parameter `name` of a network is: in the hub's layout, else in the original one.

    Args:
        original: prefix of the network's names in the original layout.
        outside: module outside the blocks -> its name in the hub's layout.
        blocks: what the hub calls the list of blocks.
        inside: module inside a block -> its name there.
    """
    block, module, parameter = _PATH.fullmatch(name).groups()
    if block is None:
        prefix, found = "", outside[module]
    elif block == "cross_attention_block.":
        prefix, found = "pooler.cross_attention_layer.", inside[module]
    else:
        prefix, found = f"{blocks}.{block.split('.')[1]}.", inside[module]
    parts = (found,) if isinstance(found, str) else found
    hub = Source(tuple(f"{prefix}{part}.{parameter}" for part in parts))
    return [hub, Source((f"{original}{name}",))]
