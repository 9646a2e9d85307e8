"""Read tensors from a folder or file in a layout that models are published in.

Understood, in order of preference:

    *.safetensors, with `*.safetensors.index.json` if it is sharded
    *.bin, *.pt, *.pth written by torch.save, with `*.bin.index.json` if it is sharded
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mstar.errors import ModelNotFound, WeightsError

__all__ = ["Checkpoint", "state_dicts"]

_PICKLES = (".bin", ".pt", ".pth")


class Checkpoint:
    """The tensors of one checkpoint by name; values are read when they are asked for.

    Files stay memory-mapped as long as this object lives, so only what `read` returns takes
    memory. (The torch.save format from before torch 1.6 cannot be mapped and is read whole.)
    """

    def __init__(self, path: Path, files: dict[str, list[Path]], key: str | None = None) -> None:
        """Use `Checkpoint.open`. `files`: for each tensor the files that hold it."""
        self.path = path
        self._files = files
        self._key = key
        self._readers: dict[Path, _Safetensors | _Pickle] = {}

    @classmethod
    def open(cls, path: str | Path, key: str | None = None) -> Checkpoint:
        """Open a folder or a single file.

        Args:
            key: for `.bin`, `.pt` and `.pth` files that hold a dict of state dicts, such as
                `{"model": {...}, "epoch": 3}`: the one to take (see `state_dicts`).

        Raises:
            ModelNotFound: there is no such path.
            WeightsError: nothing there is a checkpoint, shards are missing, or a file is corrupt.
        """
        path = Path(path)
        if path.is_dir():
            listed, loose = _layout(path)
        elif path.exists():
            listed, loose = {}, [path]
        else:
            raise ModelNotFound(f"no file or folder {path}")
        checkpoint = cls(path, {name: [file] for name, file in listed.items()}, key)
        for file in loose:
            for name in checkpoint._reader(file).names():
                if name not in listed:
                    checkpoint._files.setdefault(name, []).append(file)
        return checkpoint

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    def __str__(self) -> str:
        return f"checkpoint {self.path}"

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor, without reading its values.

        Raises:
            WeightsError: no tensor of that name, or several.
        """
        reader = self._reader(self._file(name))
        with _faults(reader.path):
            return reader.shape(name)

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, on the CPU, for the caller to keep.

        Raises:
            WeightsError: no tensor of that name, several, or its file is corrupt.
        """
        reader = self._reader(self._file(name))
        with _faults(reader.path):
            return reader.read(name)

    def _file(self, name: str) -> Path:
        files = self._files.get(name)
        if not files:
            raise WeightsError(f"{self} has no tensor {name}")
        if len(files) > 1:
            where = ", ".join(file.name for file in files)
            raise WeightsError(f"{self}: {name} is in several files ({where}); name one file")
        return files[0]

    def _reader(self, file: Path) -> _Safetensors | _Pickle:
        if file not in self._readers:
            with _faults(file):
                if file.suffix == ".safetensors":
                    self._readers[file] = _Safetensors(file)
                elif file.suffix in _PICKLES:
                    self._readers[file] = _Pickle(file, self._key)
                else:
                    known = ", ".join((".safetensors", *_PICKLES))
                    raise WeightsError(f"{file} is not a checkpoint: expected {known}")
        return self._readers[file]


class _Safetensors:
    """Tensors are read with plain file reads: pages of a memory map would count as ours, and a
    checkpoint would seem to take twice its size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt", device="cpu"):
            pass  # the library checks the header and the file's length
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._entries = json.loads(file.read(length))
            self._start = 8 + length
        self._entries.pop("__metadata__", None)

    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._entries[name]["shape"])

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise WeightsError(f"{self.path}: {name} is stored as {entry['dtype']}: not supported")
        begin, end = entry["data_offsets"]
        if begin == end:
            return torch.empty(entry["shape"], dtype=dtype)
        raw = torch.empty(end - begin, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self._start + begin)
            if file.readinto(raw.numpy()) != end - begin:
                raise WeightsError(f"{self.path} ends inside {name}")
        return raw.view(dtype).view(entry["shape"])


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Pickle:
    def __init__(self, path: Path, key: str | None) -> None:
        self.path = path
        content = _unpickled(path)
        groups = _groups(content)
        if key is not None:
            if key not in groups:
                raise WeightsError(f"{path} has no state dict {key!r}; it has {list(groups)}")
            content = groups[key]
        self._tensors = {n: value for n, value in content.items() if isinstance(value, Tensor)}
        if not self._tensors:
            hint = f"; choose one of its state dicts: key={' or '.join(map(repr, groups))}"
            raise WeightsError(f"{path} holds no tensors{hint if groups and key is None else ''}")

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> torch.Size:
        return self._tensors[name].shape

    def read(self, name: str) -> Tensor:
        return self._tensors[name].clone()  # not a view of the memory map


def state_dicts(path: Path) -> list[str]:
    """The keys by which `Checkpoint.open` takes state dicts out of a `.bin`, `.pt` or `.pth` file:
    names in its dict, `name[0]` and so on for lists.

    Raises:
        WeightsError: it cannot be read, or holds no dict.
    """
    with _faults(path):
        return list(_groups(_unpickled(path)))


def _unpickled(path: Path) -> dict:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def _groups(content: dict) -> dict[str, dict]:
    """The dicts inside a dict, and those in its lists."""
    found = {}
    for name, value in content.items():
        if isinstance(value, (list, tuple)):
            found |= {f"{name}[{i}]": item for i, item in enumerate(value)}
        else:
            found[name] = value
    return {name: value for name, value in found.items() if isinstance(value, dict)}


@contextmanager
def _faults(file: Path) -> Iterator[None]:
    """Whatever reading the bytes of `file` raises becomes a WeightsError that names it."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # the bytes are a stranger's: anything may go wrong
        text = str(error).strip()
        reason = text.splitlines()[0] if text else type(error).__name__
        if isinstance(error, KeyError):
            reason = f"no entry {text}"
        elif isinstance(error, pickle.UnpicklingError) and "weights_only" in text:
            reason = "it is damaged, or holds more than tensors (code in a pickle is never run)"
        raise WeightsError(f"cannot read {file}: {reason}") from error


def _layout(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """The indexed tensors of a folder, and the files whose tensors no index lists."""
    kinds = [(".safetensors",), _PICKLES]
    for endings in kinds:
        indexes = [f for end in endings for f in sorted(folder.glob(f"*{end}.index.json"))]
        files = [f for end in endings for f in sorted(folder.glob(f"*{end}"))]
        if indexes:
            listed = _indexed(indexes)
            return listed, [f for f in files if endings != _PICKLES and f not in listed.values()]
        if files:
            usual = folder / "pytorch_model.bin"  # next to it there may be training_args.bin
            return {}, [usual] if usual in files else files
    expected = ", ".join(f"*{end}" for end in (".safetensors", *_PICKLES))
    raise WeightsError(f"no weights in {folder}: expected {expected}")


def _indexed(indexes: list[Path]) -> dict[str, Path]:
    """Tensor name -> shard, after `{"weight_map": {name: file}}` of every index."""
    listed: dict[str, Path] = {}
    for index in indexes:
        with _faults(index):
            shards = json.loads(index.read_text())["weight_map"]
            listed |= {name: index.parent / shard for name, shard in shards.items()}
    missing = sorted({file.name for file in listed.values() if not file.is_file()})
    if missing:
        raise WeightsError(f"{indexes[0].parent} lacks shards: {', '.join(missing)}")
    return listed
