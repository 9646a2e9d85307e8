"""resolve: local paths, the hub's cache, and errors that say what to do. No network."""

import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import are_progress_bars_disabled

from mstar.engine import hub
from mstar.engine.hub import is_cached, resolve
from mstar.errors import ModelNotFound

WANTED = ("*.json", "*.safetensors")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds `owner/net` at main and at v1, in offline mode."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    home = tmp_path / "hub" / "models--owner--net"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "blobs" / "b1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/b1")
    (home / "refs").mkdir()
    for ref in ("main", "v1"):
        (home / "refs" / ref).write_text(COMMIT)
    return snapshot


def test_local_paths_are_themselves(tmp_path, monkeypatch):
    file = tmp_path / "net.pt"
    file.write_text("")
    assert resolve(tmp_path, patterns=WANTED) == tmp_path
    assert resolve(str(file), patterns=WANTED) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/net.pt", patterns=WANTED) == file


def test_a_local_folder_wins_over_a_repository_of_that_name(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "net").mkdir(parents=True)
    assert resolve("owner/net", patterns=WANTED).resolve() == tmp_path / "owner" / "net"


@pytest.mark.parametrize("name", ["owner/net", "owner/net@v1", f"owner/net@{COMMIT}"])
def test_a_cached_repository_needs_no_network(name, cache):
    assert is_cached(name)
    folder = resolve(name, patterns=WANTED, progress=False)
    assert folder.samefile(cache)
    assert (folder / "config.json").read_text() == "{}"


def test_offline_and_not_cached_says_what_to_do(cache, tmp_path):
    assert not is_cached("owner/other")
    assert not is_cached("owner/net@v2")
    with pytest.raises(ModelNotFound) as error:
        resolve("owner/other", patterns=WANTED)
    text = str(error.value)
    for part in ("owner/other", "HF_HUB_OFFLINE", str(tmp_path / "hub"), "weights=<folder>"):
        assert part in text
    assert "\n" not in text


def test_a_file_elsewhere_is_for_the_user_to_download():
    with pytest.raises(ModelNotFound, match="download it, then give its file"):
        resolve("https://example.org/model.pt", patterns=["*"])


@pytest.mark.parametrize("source", ["nowhere", "./a/b", "/no/such/folder", "a/b/c", "~/x/y", ""])
def test_what_is_neither_a_path_nor_a_repository(source, cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="no such file or folder"):
        resolve(source, patterns=WANTED)
    assert not is_cached(source)


class Answer:
    """As much of an HTTP response as the hub's errors look at."""

    def __init__(self):
        self.headers, self.request, self.status_code, self.text = {}, None, 404, ""


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (errors.GatedRepoError, "gated: accept its terms"),
        (errors.RepositoryNotFoundError, "no such repository, or it is private"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (ConnectionResetError, "ConnectionResetError: broke"),
    ],
)
def test_the_hubs_errors_become_advice(kind, says, cache, monkeypatch):
    def fail(*args, **kwargs):
        try:
            raise kind("broke\nmore", response=Answer())
        except TypeError:  # one that carries no response
            raise kind("broke\nmore") from None

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFound, match=says) as error:
        resolve("owner/net@v9", patterns=WANTED)
    assert "more" not in str(error.value)


def test_a_repository_without_the_wanted_files(cache):
    with pytest.raises(ModelNotFound, match=r"none of the files \*\.bin"):
        resolve("owner/net", patterns=("*.bin",))


def test_progress_bars_are_quiet_only_during_the_call(cache, monkeypatch):
    seen = []

    def download(*args, **kwargs):
        seen.append((are_progress_bars_disabled(), kwargs["allow_patterns"], kwargs["revision"]))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    before = are_progress_bars_disabled()
    resolve("owner/net@v1", patterns=WANTED, progress=False)
    assert seen == [(True, list(WANTED), "v1")]
    assert are_progress_bars_disabled() == before


def test_looking_into_the_cache_does_not_load_the_hub_client():
    code = (
        "import sys; from mstar.engine.hub import is_cached; is_cached('a/b'); "
        "assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub._cache() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", "~/c")
    assert hub._cache() == tmp_path / "c"
