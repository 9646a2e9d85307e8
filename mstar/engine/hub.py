"""Find a checkpoint: a path on this machine, or a repository on the Hugging Face hub.

The hub's own environment variables hold: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN,
HF_ENDPOINT. They are read at each call.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mstar.errors import ModelNotFound

__all__ = ["is_cached", "resolve"]

_REPO = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")
_TRUE = {"1", "ON", "YES", "TRUE"}


def resolve(source: str | Path, *, patterns: Sequence[str], progress: bool = True) -> Path:
    """The local folder or file of a checkpoint, downloaded first if need be.

    Args:
        source: a path, or `owner/name` or `owner/name@revision` on the hub (a branch, tag or
            commit). A path that exists wins.
        patterns: the files wanted from a hub repository, such as `("*.json", "*.safetensors")`.
        progress: show the hub's progress bars while downloading.

    Raises:
        ModelNotFound: neither; or the hub does not have it, cannot be reached, or wants a login.
    """
    local = Path(source).expanduser()
    if source != "" and local.exists():
        return local
    if str(source).startswith("https://"):
        raise ModelNotFound(f"{source} is not on the hub: download it, then give its file.")
    match = None if isinstance(source, Path) else _REPO.fullmatch(source)
    if match is None:
        raise ModelNotFound(
            f"no checkpoint at {source}: there is no such file or folder, and it is not a "
            "repository id on the Hugging Face hub either (owner/name, or owner/name@revision)."
        )
    repo, revision = match["repo"], match["revision"]
    cache = _cache()
    try:
        folder = Path(_download(repo, revision, patterns, cache, progress))
    except Exception as error:  # the hub's client raises errors of several libraries
        raise ModelNotFound(_explain(source, cache, error)) from None
    if not any(True for pattern in patterns for _ in folder.glob(pattern)):
        wanted = ", ".join(patterns)
        raise ModelNotFound(f"{source} on the Hugging Face hub has none of the files {wanted}.")
    return folder


def is_cached(repo: str) -> bool:
    """Whether some files of `owner/name[@revision]` lie in the local hub cache.

    Looks only at the disk. It does not tell whether every file is there.
    """
    match = _REPO.fullmatch(repo)
    if match is None:
        return False
    home = _cache() / f"models--{match['repo'].replace('/', '--')}"
    revision = match["revision"] or "main"
    try:
        commit = (home / "refs" / revision).read_text().strip()
    except OSError:
        commit = revision
    snapshot = home / "snapshots" / commit
    return snapshot.is_dir() and any(snapshot.iterdir())


def _cache() -> Path:
    """The hub's cache folder, by the same rules as its own client."""
    env = os.environ
    cache = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE")
    if not cache:
        base = env.get("XDG_CACHE_HOME") or "~/.cache"
        cache = os.path.join(env.get("HF_HOME") or os.path.join(base, "huggingface"), "hub")
    return Path(os.path.expanduser(os.path.expandvars(cache)))


def _offline() -> bool:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)


def _download(
    repo: str, revision: str | None, patterns: Sequence[str], cache: Path, progress: bool
) -> str:
    from huggingface_hub import snapshot_download

    with _bars(progress):
        return snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(patterns),
            cache_dir=cache,
            local_files_only=_offline(),
        )


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """The hub's progress bars, which only a process-wide switch turns off."""
    from huggingface_hub import utils

    if shown or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _explain(source: str | Path, cache: Path, error: Exception) -> str:
    """One paragraph: what was looked for, where, what went wrong, and what to do."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        reason = (
            "the repository is gated: accept its terms on its page on the hub, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    elif "RepositoryNotFoundError" in kinds:
        reason = "the hub has no such repository, or it is private (log in with `hf auth login`)"
    elif "RevisionNotFoundError" in kinds:
        reason = "the repository has no such revision"
    elif _offline():
        reason = "it is not (fully) in the cache, and HF_HUB_OFFLINE forbids a download"
    elif "LocalEntryNotFoundError" in kinds:
        reason = "it is not (fully) in the cache, and the hub cannot be reached"
    else:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return (
        f"cannot get {source} from the Hugging Face hub: {reason}. Looked for a local path of "
        f"that name and in the cache {cache}. If you have the files, give their folder: "
        "weights=<folder>, or weights={part: <folder>} for one part of a model "
        "(in the shell --weights part=<folder>)."
    )
