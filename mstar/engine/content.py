"""What a token is, as one integer, so that the prefix cache can compare sequences.

A text token is its id. A token of an image, a sound or a video is a hash of the media's bytes and
of the token's place in it, negative so that it cannot be mistaken for an id.
"""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["media_content"]


def media_content(data: bytes | np.ndarray, tokens: int, kind: str = "") -> list[int]:
    """Content of the `tokens` tokens that a medium becomes.

    Args:
        data: the medium's bytes, or its decoded array.
        kind: whatever else decides what the tokens are (the encoder, a size, a frame rate).
    """
    digest = hashlib.blake2b(kind.encode() + b"\0", digest_size=8)
    if isinstance(data, np.ndarray):
        digest.update(f"{data.dtype}{data.shape}".encode())
        data = np.ascontiguousarray(data).tobytes()
    digest.update(data)
    seed = np.frombuffer(digest.digest(), dtype=np.uint64)
    places = np.arange(1, tokens + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (-1 - ((seed + places) >> np.uint64(1)).astype(np.int64)).tolist()
