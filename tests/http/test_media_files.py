"""Media that lie in the operator's folder, and nothing beside it."""

from __future__ import annotations

import asyncio
import os

import pytest

from mstar.errors import InvalidRequest
from mstar.http.front import Front
from mstar.http.media import media_bytes
from mstar.http.settings import Settings
from tests.every_modality import picture

IMAGE = picture(8, 8, 3)


@pytest.fixture
def folder(tmp_path):
    """`media` with an image in it, and a secret beside it."""
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(IMAGE)
    (folder / "sub" / "b c.png").write_bytes(IMAGE)
    (tmp_path / "secret.png").write_bytes(IMAGE)
    (tmp_path / "media-too").mkdir()
    (tmp_path / "media-too" / "a.png").write_bytes(IMAGE)
    return folder


def get(folder, url: str, **settings) -> bytes:
    front = object.__new__(Front)
    front.settings = Settings(media_dir=folder, **settings)
    return asyncio.run(media_bytes(front, "image", url, "messages[0]"))


def refused(folder, url: str, **settings) -> str:
    with pytest.raises(InvalidRequest) as error:
        get(folder, url, **settings)
    assert error.value.field == "messages[0]"
    assert folder is None or str(folder) not in error.value.allowed
    return error.value.allowed


def test_off_means_that_no_file_is_read(folder):
    for url in (f"file://{folder}/a.png", "a.png", f"{folder}/a.png"):
        assert "--media-dir" in refused(None, url)


def test_files_of_the_folder_are_read(folder):
    for url in (
        "a.png",
        "./sub/../a.png",
        "sub/b c.png",
        f"{folder}/a.png",
        f"file://{folder}/a.png",
        f"FILE://localhost{folder}/sub/b%20c.png",
        f"file:{folder}/a.png",
    ):
        assert get(folder, url) == IMAGE


def test_nothing_outside_is_read(folder):
    outside = folder.parent / "secret.png"
    (folder / "link.png").symlink_to(outside)
    (folder / "up").symlink_to(folder.parent)
    (folder / "inner.png").symlink_to(folder / "a.png")
    assert get(folder, "inner.png") == IMAGE
    for url in (
        "../secret.png",
        "sub/../../secret.png",
        "../media-too/a.png",
        str(outside),
        f"file://{outside}",
        f"file://{folder}/%2e%2e/secret.png",
        "link.png",
        "up/secret.png",
        "/etc/passwd",
        "/proc/self/environ",
        "../not-there.png",
        ".",
        "",
    ):
        assert "must lie in" in refused(folder, url) or url == "", url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("not-there.png", "no such file"),
        ("a.png/b.png", "no such file"),
        ("sub", "no such file|is no plain file"),
        ("pipe", "is no plain file"),
        ("a\0.png", "is not a path"),
        ("x" * 300, "no such file"),
        ("x" * 5000, "is not a path"),
        ("file://example.com/a.png", "must be file:///path"),
        ("file:///a.png?x", "must be file:///path"),
        ("file://[::1/a.png", "is not a URL"),
        ("ftp://example.com/a.png", "must be a data, http, https or file URL"),
        ("text.png", "holds text"),
        ("empty.png", "holds nothing"),
    ],
)
def test_what_cannot_be_read(folder, url, message):
    os.mkfifo(folder / "pipe")
    (folder / "text.png").write_text("hello")
    (folder / "empty.png").touch()
    said = refused(folder, url)
    assert any(words in said for words in message.split("|")), said


def test_files_are_limited_in_bytes(folder):
    assert "more bytes than" in refused(folder, "a.png", max_body_mb=(len(IMAGE) - 1) / 2**20)
    assert get(folder, "a.png", max_body_mb=len(IMAGE) / 2**20) == IMAGE


def test_a_folder_that_changes_under_the_check_is_noticed(folder, monkeypatch):
    """Between the check and the opening, a part of the path becomes a link that leads outside."""
    (folder.parent / "b c.png").write_bytes(IMAGE)
    opened = os.open

    def late(path, flags, *args, **kwargs):
        if str(path).endswith("b c.png"):
            (folder / "sub").rename(folder / "was")
            (folder / "sub").symlink_to(folder.parent)
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", late)
    assert "must lie in" in refused(folder, "sub/b c.png")
