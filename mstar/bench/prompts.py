"""What the requests say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mstar.errors import InvalidRequest
from mstar.io.sniff import kind_of

__all__ = ["TALK", "Attachment", "Prompt", "attachments", "built_in", "from_file"]

TALK = (
    "What is the tide?",
    "The ferry leaves at seven, so bring a coat and something to read.",
    "Describe a small harbour town early on a winter morning, before the first boats go out. "
    "Say what can be heard, what the air smells of, and who is already awake.",
    "A clockmaker in a mountain village notices that every clock in her shop has begun to run "
    "four minutes slow, all on the same night. She opens one, then another, and finds nothing "
    "wrong. The church clock across the square is slow as well, and so is the watch of the "
    "postman, who swears that he set it at the station. Tell how she finds the reason, whom she "
    "asks first, what she believes for a while although it is false, and how the village lives "
    "with the answer. Keep it plain, in the past tense, and let the last sentence be short.",
)
SCENES = (
    "A red bicycle against a white wall",
    "A lighthouse on a rock at dusk, seen from a small boat, long waves, warm light in the window",
    "A kitchen table in morning light with a blue teapot, three lemons, an open notebook and a cat "
    "that looks out of the window; watercolour, pale paper, few strokes",
)
# To speak, each in a voice of Orpheus'; its tiny checkpoint has learnt these, and hardly any other.
SPEECH = (
    ("Hello there, how are you doing today?", "tara"),
    ("The quick brown fox jumps over the lazy dog.", "leah"),
    ("I am fine, thank you very much. <sigh>", "leo"),
)
_TEXT_KEYS = ("prompt", "text", "input")


@dataclass(frozen=True)
class Attachment:
    """A file to send along; `kind` is image, audio or video."""

    name: str
    data: bytes
    kind: str


@dataclass(frozen=True)
class Prompt:
    """A text, or the messages of a chat; `voice` is for models that have it."""

    text: str
    messages: tuple[dict[str, Any], ...] | None = None
    voice: str | None = None


def built_in(use: str) -> list[Prompt]:
    """Texts of several lengths, to `paint`, to `speak` or to `talk` about."""
    if use == "speak":
        return [Prompt(text, voice=voice) for text, voice in SPEECH]
    return [Prompt(text) for text in (SCENES if use == "paint" else TALK)]


def from_file(path: Path) -> list[Prompt]:
    """One prompt a line; in a file named .jsonl each line is a string, or an object with `prompt`
    (or `text`, `input`) or `messages`. Other keys are left alone.

    Raises:
        InvalidRequest: the file cannot be read, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InvalidRequest("--prompts", str(path), f"cannot be read: {why}") from None
    as_json = path.suffix.lower() in (".jsonl", ".ndjson")
    prompts = [
        _of_json(path, number, line) if as_json else Prompt(line)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise InvalidRequest("--prompts", str(path), "holds no prompt")
    return prompts


def attachments(paths: Sequence[Path]) -> list[Attachment]:
    """Files by their content.

    Raises:
        InvalidRequest: one cannot be read, or is no image, sound or video.
    """
    found = []
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InvalidRequest("--attach", str(path), error.strerror or str(error)) from None
        kind = kind_of(data, path.name)
        if kind not in ("image", "audio", "video"):
            raise InvalidRequest("--attach", str(path), "must be an image, sound or video")
        found.append(Attachment(path.name, data, kind))
    return found


def _of_json(path: Path, number: int, line: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        allowed = f"line {number} is not JSON: {error}"
        raise InvalidRequest("--prompts", str(path), allowed) from None
    if isinstance(value, str):
        return Prompt(value)
    if isinstance(value, dict):
        text = next((value[key] for key in _TEXT_KEYS if isinstance(value.get(key), str)), None)
        messages = value.get("messages")
        if isinstance(messages, list) and messages:
            return Prompt(text or "", tuple(messages))
        if text is not None:
            return Prompt(text)
    allowed = f"line {number} must be a string or an object with prompt, messages"
    raise InvalidRequest("--prompts", str(path), allowed)
