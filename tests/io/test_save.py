"""A result is written whole or not at all, and over nothing that is there."""

import base64
import errno
import io
import json
import os

import numpy as np
import pytest
import soundfile
from PIL import Image

from mstar.errors import InvalidRequest, RequestFailed
from mstar.io import save as module
from mstar.io.save import as_data, check_path, encode, modalities_of, save, write_file
from mstar.types import AudioBuffer, GenerateResult, Usage


def png(color):
    out = io.BytesIO()
    Image.new("RGBA", (4, 4), color).save(out, "PNG")
    return out.getvalue()


def everything(images=1, samples=4000):
    return GenerateResult(
        text="grüße",
        images=[png(color) for color in ("red", "green", "blue")[:images]],
        audio=AudioBuffer(np.arange(samples, dtype=np.int16), 24000),
        actions=np.ones((2, 3), np.float32),
        latents=[np.zeros((1, 2), np.float32)],
        finish_reason="stop",
        usage=Usage(generated_tokens=5),
        request_id="r1",
    )


NOTHING = GenerateResult(finish_reason="length")


def test_the_extension_says_what_a_file_can_hold(tmp_path):
    assert modalities_of(tmp_path / "A.WAV") == ("audio",)
    assert "latent" in modalities_of(tmp_path / "a.npz")
    with pytest.raises(InvalidRequest, match=r"a\.doc.*extension must be one of \.wav"):
        modalities_of(tmp_path / "a.doc")
    with pytest.raises(InvalidRequest, match=r"suffix='\.doc'"):
        encode(everything(), ".doc")


def test_every_part_goes_to_its_file(tmp_path):
    names = ["a.wav", "a.flac", "a.png", "a.jpg", "a.txt", "a.npz", "a.json"]
    paths = [tmp_path / name for name in names]
    assert save(everything(), paths) == paths
    for sound in paths[:2]:
        data, rate = soundfile.read(sound, dtype="int16")
        assert rate == 24000
        assert np.array_equal(data, np.arange(4000))
    assert (tmp_path / "a.png").read_bytes() == png("red")
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "grüße"
    arrays = np.load(tmp_path / "a.npz")
    assert set(arrays) == {"actions", "latents_0", "audio", "sample_rate"}
    assert json.loads((tmp_path / "a.json").read_text()) == as_data(everything())
    assert sorted(names) == sorted(os.listdir(tmp_path))


def test_all_of_a_result_is_plain_data():
    data = json.loads(json.dumps(as_data(everything())))
    assert (data["request_id"], data["text"], data["finish_reason"]) == ("r1", "grüße", "stop")
    assert data["usage"]["generated_tokens"] == 5
    assert base64.b64decode(data["images"][0]) == png("red")
    assert base64.b64decode(data["audio"]["wav"]) == everything().audio.to_wav()
    assert data["actions"] == [[1, 1, 1], [1, 1, 1]]
    assert data["latents"] == [[[0, 0]]]
    assert as_data(NOTHING)["audio"] is None


def test_sound_without_samples_is_a_wav_or_an_error(tmp_path):
    silent = everything(samples=0)
    save(silent, [tmp_path / "a.wav", tmp_path / "a.json"])
    assert soundfile.info(tmp_path / "a.wav").frames == 0
    assert as_data(silent)["audio"]["sample_rate"] == 24000
    for suffix in (".flac", ".ogg", ".opus", ".mp3"):
        with pytest.raises(RequestFailed, match=r"made no audio \(finish_reason=stop\)"):
            encode(silent, suffix)


@pytest.mark.parametrize(
    ("suffix", "what"), [(".wav", "audio"), (".mp3", "audio"), (".png", "image"), (".npz", "array")]
)
def test_what_the_model_did_not_make_is_not_written(tmp_path, suffix, what):
    with pytest.raises(RequestFailed, match=rf"made no {what} \(finish_reason=length\)"):
        save(NOTHING, [tmp_path / "a.txt", tmp_path / f"a{suffix}"])
    assert os.listdir(tmp_path) == []


def test_one_array_fits_into_npy(tmp_path):
    save(GenerateResult(actions=np.ones((2, 3))), [tmp_path / "a.npy"])
    assert np.load(tmp_path / "a.npy").shape == (2, 3)
    with pytest.raises(RequestFailed, match=r"3 arrays \(actions, latents_0, audio\): use .npz"):
        encode(everything(), ".npy")


def test_further_images_are_numbered_past_the_names_that_are_taken(tmp_path):
    (tmp_path / "a-2.png").write_text("mine")
    written = save(everything(images=3), [tmp_path / "a.png"])
    assert [path.name for path in written] == ["a.png", "a-3.png", "a-4.png"]
    assert written[2].read_bytes() == png("blue")
    assert (tmp_path / "a-2.png").read_text() == "mine"
    written = save(everything(images=2), [tmp_path / "a.png"], overwrite=True)
    assert [path.name for path in written] == ["a.png", "a-2.png"]


def test_a_file_that_is_there_is_kept_unless_told(tmp_path):
    path = tmp_path / "a.wav"
    path.write_text("mine")
    for attempt in (lambda: check_path(path), lambda: save(everything(), [path])):
        with pytest.raises(FileExistsError, match="exists") as caught:
            attempt()
        assert caught.value.filename == str(path)
    assert path.read_text() == "mine"
    check_path(path, overwrite=True)
    save(everything(), [path], overwrite=True)
    assert soundfile.info(path).frames == 4000
    assert os.listdir(tmp_path) == ["a.wav"]


def test_a_link_is_kept_and_its_file_replaced(tmp_path):
    link, real = tmp_path / "link.txt", tmp_path / "real.txt"
    real.write_text("old")
    link.symlink_to(real)
    with pytest.raises(FileExistsError):
        write_file(link, b"new")
    write_file(link, b"new", overwrite=True)
    assert link.is_symlink()
    assert real.read_bytes() == b"new"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("mine")

    def full(beside, data):
        beside.open("wb").write(data[:1])
        raise OSError(errno.ENOSPC, "the disk is full", str(beside))

    monkeypatch.setattr(module.Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"full: '.*/a\.txt'"):
        write_file(path, b"theirs", overwrite=True)
    with pytest.raises(OSError, match="full"):
        write_file(tmp_path / "b.txt", b"theirs")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "mine"


def test_a_new_file_has_the_usual_rights(tmp_path):
    (tmp_path / "usual.txt").write_text("x")
    write_file(tmp_path / "a.txt", b"x")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "usual.txt").stat().st_mode


def test_places_that_cannot_be_written_are_known_beforehand(tmp_path, monkeypatch):
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    for name, words in [
        ("no/such/a.wav", "there is no folder"),
        ("folder.wav", "is a folder"),
        ("pipe.wav", "not a regular file"),
        ("a.doc", "extension"),
    ]:
        with pytest.raises(InvalidRequest, match=words):
            check_path(tmp_path / name, overwrite=True)
    monkeypatch.setattr(soundfile, "check_format", lambda *args: False)
    with pytest.raises(InvalidRequest, match="format='mp3': is not in this machine's libsndfile"):
        check_path(tmp_path / "a.mp3")
    monkeypatch.setattr(module.os, "access", lambda *args: False)
    with pytest.raises(InvalidRequest, match="cannot be written to"):
        check_path(tmp_path / "a.wav")
