"""Results as files: what an extension can hold, and files that are written whole or not at all."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mstar.errors import InvalidRequest, RequestFailed
from mstar.io.audio import FORMATS, check_format, encode_audio
from mstar.types import GenerateResult

__all__ = [
    "HOLDS",
    "as_data",
    "check_path",
    "encode",
    "modalities_of",
    "save",
    "summary",
    "write_file",
]

_AUDIO = {f".{name}": ("audio",) for name in FORMATS}
_ARRAYS = ("action", "latent", "audio")
# Extension -> the modalities that such a file can hold.
HOLDS: dict[str, tuple[str, ...]] = {
    **_AUDIO,
    ".png": ("image",),
    ".jpg": ("image",),
    ".jpeg": ("image",),
    ".txt": ("text",),
    ".npy": _ARRAYS,
    ".npz": _ARRAYS,
    ".csv": ("action",),
    ".json": ("text", "image", "audio", "action", "latent"),
}


def modalities_of(path: Path) -> tuple[str, ...]:
    """The modalities that a file of that name can hold.

    Raises:
        InvalidRequest: the extension is not in `HOLDS`.
    """
    suffix = path.suffix.lower()
    if suffix not in HOLDS:
        raise InvalidRequest("path", str(path), f"the extension must be one of {' '.join(HOLDS)}")
    return HOLDS[suffix]


def check_path(path: Path, *, overwrite: bool = False) -> None:
    """Find out before the work is done whether a result can be saved there.

    Raises:
        InvalidRequest: it cannot. FileExistsError: there is a file, and it is not to be replaced.
    """
    modalities_of(path)
    if path.suffix.lower() in _AUDIO:
        check_format(path.suffix.lower().removeprefix("."))
    if not path.parent.is_dir():
        raise InvalidRequest("path", str(path), f"there is no folder {path.parent}")
    if path.is_dir():
        raise InvalidRequest("path", str(path), "is a folder")
    if path.exists() and not path.is_file():
        raise InvalidRequest("path", str(path), "is not a regular file")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(errno.EEXIST, "exists already", str(path))
    if not os.access(path.parent, os.W_OK):
        raise InvalidRequest("path", str(path), f"the folder {path.parent} cannot be written to")


def save(result: GenerateResult, paths: Sequence[Path], *, overwrite: bool = False) -> list[Path]:
    """Write to each path what its extension says.

    All is encoded before the first file is written. Of several images, those after the first go
    to `name-2.png`, `name-3.png`, ...; names that are taken are passed over unless `overwrite`.

    Returns:
        The files written.

    Raises:
        InvalidRequest, RequestFailed: see `encode`. FileExistsError: see `write_file`.
    """
    contents = []
    for path in paths:
        suffix = path.suffix.lower()
        contents.append((path, encode(result, suffix)))
        if modalities_of(path) == ("image",):
            numbered = (path.with_stem(f"{path.stem}-{n}") for n in range(2, 1 << 20))
            free = (other for other in numbered if overwrite or not os.path.lexists(other))
            for index, other in zip(range(1, len(result.images)), free, strict=False):
                contents.append((other, encode(result, suffix, index)))
    for path, data in contents:
        write_file(path, data, overwrite=overwrite)
    return [path for path, _ in contents]


def write_file(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Write a whole file or none, through a hidden neighbour that is renamed at the end.

    Raises:
        FileExistsError: the file is there and `overwrite` is false.
    """
    if overwrite:
        path = Path(os.path.realpath(path))  # replace what a link points to, not the link
    beside = path.with_name(f".mstar-{uuid.uuid4().hex}.part")
    try:
        beside.write_bytes(data)
        if not overwrite:
            path.touch(exist_ok=False)  # nobody else can take the name from here on
        os.replace(beside, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # not the neighbour, which nobody knows
        raise
    finally:
        beside.unlink(missing_ok=True)


def encode(result: GenerateResult, suffix: str, index: int = 0) -> bytes:
    """The result, or its image number `index`, as the bytes of a file with that extension.

    Raises:
        RequestFailed: the result lacks what such a file holds.
        InvalidRequest: the extension is not known, or the format cannot hold that sound.
    """
    if suffix not in HOLDS:
        raise InvalidRequest("suffix", suffix, f"must be one of {' '.join(HOLDS)}")
    if suffix == ".txt":
        return result.text.encode()
    if suffix == ".json":
        return json.dumps(as_data(result)).encode()
    if suffix in (".npy", ".npz"):
        return _encode_arrays(result, suffix)
    if suffix == ".csv":
        return _encode_table(result)
    if suffix in _AUDIO:
        if result.audio is None or (len(result.audio) == 0 and suffix != ".wav"):
            raise _nothing("audio", result)
        return encode_audio(result.audio, suffix.removeprefix("."))
    if not result.images:
        raise _nothing("image", result)
    return result.images[index] if suffix == ".png" else _to_jpeg(result.images[index])


def summary(result: GenerateResult) -> dict[str, Any]:
    """Text, labels, end and usage of a result as plain data, ready for JSON."""
    labelled = {"labels": result.labels, "scores": result.scores} if result.labels else {}
    return {
        "request_id": result.request_id,
        "text": result.text,
        **labelled,
        "finish_reason": result.finish_reason,
        "usage": asdict(result.usage) if result.usage else None,
    }


def as_data(result: GenerateResult) -> dict[str, Any]:
    """All of a result as plain data; images are base64 of PNG, audio is base64 of WAV."""
    audio = result.audio
    return {
        **summary(result),
        "images": [_base64(image) for image in result.images],
        "audio": None
        if audio is None
        else {"sample_rate": audio.sample_rate, "wav": _base64(audio.to_wav())},
        "actions": None if result.actions is None else result.actions.tolist(),
        "latents": [latents.tolist() for latents in result.latents],
    }


def _encode_arrays(result: GenerateResult, suffix: str) -> bytes:
    arrays = {} if result.actions is None else {"actions": result.actions}
    arrays |= {f"latents_{i}": latents for i, latents in enumerate(result.latents)}
    if result.audio is not None:
        arrays["audio"] = result.audio.pcm
    if not arrays:
        raise _nothing("array", result)
    out = io.BytesIO()
    if suffix == ".npy":
        if len(arrays) > 1:
            raise RequestFailed(f"there are {len(arrays)} arrays ({', '.join(arrays)}): use .npz")
        np.save(out, next(iter(arrays.values())))
    else:
        rate = {} if result.audio is None else {"sample_rate": result.audio.sample_rate}
        np.savez(out, **arrays, **rate)
    return out.getvalue()


def _encode_table(result: GenerateResult) -> bytes:
    """Actions, one a line, below the names of their columns; digits enough to be exact."""
    if result.actions is None:
        raise _nothing("action", result)
    names = ",".join(f"action_{index}" for index in range(result.actions.shape[1]))
    rows = [",".join(f"{value:.9g}" for value in row) for row in result.actions.tolist()]
    return "".join(f"{line}\n" for line in (names, *rows)).encode()


def _to_jpeg(png: bytes) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, "JPEG", quality=95)
    return out.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _nothing(what: str, result: GenerateResult) -> RequestFailed:
    return RequestFailed(f"the model made no {what} (finish_reason={result.finish_reason})")
