"""Checkpoint: every published layout reads the same, and every broken one says what is broken."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mstar.engine.checkpoint import Checkpoint
from mstar.errors import ModelNotFound, WeightsError

TENSORS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "b.weight": torch.arange(4.0).to(torch.bfloat16),
    "c.steps": torch.tensor(7),
}


def shards(folder: Path, save, ending: str, stem: str) -> None:
    names = list(TENSORS)
    first, second = f"{stem}-1-of-2{ending}", f"{stem}-2-of-2{ending}"
    save({n: TENSORS[n] for n in names[:1]}, folder / first)
    save({n: TENSORS[n] for n in names[1:]}, folder / second)
    weight_map = {n: first if n == names[0] else second for n in names}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}{ending}.index.json").write_text(json.dumps(index))


def legacy(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


LAYOUTS = {
    "one safetensors file": lambda d: save_file(TENSORS, d / "model.safetensors"),
    "safetensors shards": lambda d: shards(d, save_file, ".safetensors", "model"),
    "one bin file": lambda d: torch.save(TENSORS, d / "pytorch_model.bin"),
    "bin shards": lambda d: shards(d, torch.save, ".bin", "pytorch_model"),
    "pt file": lambda d: torch.save(TENSORS, d / "net.pt"),
    "pth file of an old torch": lambda d: legacy(TENSORS, d / "net.pth"),
}


@pytest.mark.parametrize("write", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_reads_the_same(write, tmp_path):
    write(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(checkpoint.names()) == sorted(TENSORS)
    assert len(checkpoint) == 3
    assert "a.weight" in checkpoint
    assert "z" not in checkpoint
    for name, tensor in TENSORS.items():
        assert checkpoint.shape(name) == tensor.shape
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


@pytest.mark.parametrize("name", ["model.safetensors", "net.pt"])
def test_a_single_file_opens_by_its_path(name, tmp_path):
    (save_file if name.endswith("safetensors") else torch.save)(TENSORS, tmp_path / name)
    assert sorted(Checkpoint.open(str(tmp_path / name)).names()) == sorted(TENSORS)


def test_safetensors_win_over_pickles(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert Checkpoint.open(tmp_path).read("x") == 1


def test_training_leftovers_beside_the_weights_are_not_opened(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "training_args.bin").write_bytes(b"junk")
    assert Checkpoint.open(tmp_path).names() == ["x"]


def test_files_without_an_index_are_read_together(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "ae.safetensors")
    save_file({"y": torch.ones(1)}, tmp_path / "ema.safetensors")
    assert sorted(Checkpoint.open(tmp_path).names()) == ["x", "y"]


def test_a_tensor_in_two_files_is_refused_when_it_is_used(tmp_path):
    for file in ("pre", "post"):
        save_file({"mean": torch.ones(1), file: torch.ones(1)}, tmp_path / f"{file}.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("pre") == 1
    with pytest.raises(WeightsError, match=r"mean is in several files \(post.*, pre"):
        checkpoint.read("mean")


def test_the_index_decides_over_files_it_does_not_list(tmp_path):
    shards(tmp_path, save_file, ".safetensors", "model")
    save_file({"a.weight": torch.zeros(2, 3), "extra": torch.ones(1)}, tmp_path / "vae.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.read("a.weight"), TENSORS["a.weight"])
    assert checkpoint.read("extra") == 1


@pytest.mark.parametrize(("ending", "save"), [(".safetensors", save_file), (".bin", torch.save)])
def test_missing_shards_are_named(ending, save, tmp_path):
    shards(tmp_path, save, ending, "m")
    (tmp_path / f"m-2-of-2{ending}").unlink()
    with pytest.raises(WeightsError, match=f"lacks shards: m-2-of-2{ending}"):
        Checkpoint.open(tmp_path)


def test_an_index_that_promises_too_much_is_an_error_on_reading(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "m.safetensors")
    index = {"weight_map": {"y": "m.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"m\.safetensors"):
        Checkpoint.open(tmp_path).read("y")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(text, tmp_path):
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"cannot read .*m\.safetensors\.index\.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "layout", ["one safetensors file", "one bin file", "pth file of an old torch"]
)
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_truncated_file_is_named(layout, keep, tmp_path):
    LAYOUTS[layout](tmp_path)
    (file,) = tmp_path.iterdir()
    size = file.stat().st_size
    os.truncate(file, {0.5: size // 2, -1: size - 1}.get(keep, keep))
    with pytest.raises(WeightsError, match=file.name):
        Checkpoint.open(tmp_path).read("a.weight")


class Bomb:
    def __reduce__(self):
        return os.system, ("echo ran >> /tmp/mstar-bomb",)


@pytest.mark.parametrize("save", [torch.save, legacy])
def test_code_in_a_pickle_is_refused(save, tmp_path):
    save({"x": torch.ones(1), "bomb": Bomb()}, tmp_path / "net.pt")
    with pytest.raises(WeightsError, match="never run"):
        Checkpoint.open(tmp_path)
    assert not Path("/tmp/mstar-bomb").exists()


def test_a_nested_state_dict_is_chosen_by_key(tmp_path):
    file = tmp_path / "net.pt"
    torch.save({"model": TENSORS, "ema": {"x": torch.ones(1)}, "epoch": 3}, file)
    assert sorted(Checkpoint.open(file, key="model").names()) == sorted(TENSORS)
    assert Checkpoint.open(tmp_path, key="ema").names() == ["x"]
    with pytest.raises(WeightsError, match="key='model' or 'ema'"):
        Checkpoint.open(file)
    with pytest.raises(WeightsError, match=r"no state dict 'net'.*'model', 'ema'"):
        Checkpoint.open(file, key="net")


def test_what_is_not_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(WeightsError, match="no weights in"):
        Checkpoint.open(tmp_path)
    with pytest.raises(WeightsError, match="not a checkpoint"):
        Checkpoint.open(tmp_path / "readme.md")
    with pytest.raises(ModelNotFound, match="nowhere"):
        Checkpoint.open(tmp_path / "nowhere")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="list, not a dict"):
        Checkpoint.open(tmp_path)


def test_an_unknown_tensor_is_refused(tmp_path):
    LAYOUTS["one safetensors file"](tmp_path)
    with pytest.raises(WeightsError, match="no tensor zz"):
        Checkpoint.open(tmp_path).shape("zz")
