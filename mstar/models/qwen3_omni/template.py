"""Whether a checkpoint's own chat template says what we lay out."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from mstar.models.base import Inputs
from mstar.models.qwen3_omni.prompt import Heard, Pictured, chat_pieces
from mstar.models.qwen3_omni.vision import Grid
from mstar.models.turns import turns_of

__all__ = ["check_template"]

log = logging.getLogger("mstar")

_KINDS = ("image", "audio", "video")
_SEEN = Grid(1, 2, 2)
_MEDIA = [Pictured(_SEEN), Heard(1), Pictured(_SEEN, 1.0)]
_MESSAGES = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": [{"type": kind, kind: ""} for kind in _KINDS]},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": [{"type": "text", "text": "c"}]},
]


def check_template(folder: Path) -> None:
    """Warn if the template in a checkpoint's files, where there is one, makes of some conversation
    another prompt than the published one: prompts are laid out as published, all the same."""
    try:
        template = _template(folder)
        if template is None:
            return
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        room = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        found = room.from_string(template).render(messages=_MESSAGES, add_generation_prompt=True)
    except Exception as error:
        log.warning("the chat template in %s is not used, and cannot be read: %s", folder, error)
        return
    turns, pads = turns_of(Inputs(messages=_MESSAGES), ("text", *_KINDS)), iter(_KINDS)
    pieces = chat_pieces(turns, _MEDIA)
    if found != "".join(p if isinstance(p, str) else f"<|{next(pads)}_pad|>" for p in pieces):
        log.warning("the chat template in %s is not the published one, which is used", folder)


def _template(folder: Path) -> str | None:
    """In a file of its own, or in the tokenizer's."""
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            found = json.loads(text).get("chat_template") if name.endswith("json") else text
            if isinstance(found, str):
                return found
    return None
