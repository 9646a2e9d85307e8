"""What the Talker is given: the user's turns, an opening that chooses the voice, the text to say.

The answer's text comes row by row, one with every frame: the first row is in the opening, and after
the last one there is an end and then padding, for as long as the speech goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mstar.errors import InvalidRequest
from mstar.models.qwen3_omni.config import OmniConfig, TalkerConfig
from mstar.models.qwen3_omni.prompt import Media, Pictured, Segment, lay_out_pieces
from mstar.models.qwen3_omni.talker import Talker
from mstar.models.qwen3_omni.thinker import Thinker

__all__ = ["OPENING", "Speaker", "UserRows", "speaker_id", "user_rows"]

OPENING = 9  # rows after the user's


def speaker_id(config: TalkerConfig, voice: str) -> int:
    """The id of a voice, in whichever case its name is written.

    Raises:
        InvalidRequest: there is no such voice.
    """
    found = config.speaker_id.get(voice.lower()) if isinstance(voice, str) else None
    if found is None:
        names = ", ".join(sorted(name.capitalize() for name in config.speaker_id))
        raise InvalidRequest("voice", voice, f"must be one of {names}")
    return found


@dataclass(frozen=True, eq=False)
class UserRows:
    """The part of a prompt that the Talker is given.

    Args:
        ids: of its tokens, those of the opening (padding) among them.
        rows: places of the tokens in the prompt; without those of the opening.
        is_medium: bool like the rows, for tokens of which the hidden state is given.
        positions: float32 `[3, tokens]`, those of the opening among them.
    """

    ids: list[int]
    rows: list[int]
    is_medium: Tensor
    positions: Tensor

    @property
    def next_position(self) -> float:
        """Of the first frame's step."""
        return float(self.positions.max()) + 1.0


def user_rows(segments: Sequence[Segment], config: OmniConfig) -> UserRows:
    """The turns of the user in a prompt: those of the system and past answers are left out.

    A video whose sound is interleaved counts as text for its positions, as published.
    """
    pieces: list[list[int] | Media] = []
    rows: list[int] = []
    medium: list[bool] = []
    start, user = 0, False
    for segment in segments:
        here = range(start, start + len(segment.ids))
        start = here.stop
        if segment.medium is None:
            # A role is never cut off from the mark before it: media come later.
            kept = []
            for index, token in enumerate(segment.ids):
                if token == config.im_start_token_id:
                    user = segment.ids[index + 1 : index + 2] == [config.user_token_id]
                if user:
                    kept.append(index)
            rows += [here[index] for index in kept]
            medium += [False] * len(kept)
            pieces.append([segment.ids[index] for index in kept])
        elif user:
            rows += here
            medium += [token in config.thinker.media_ids for token in segment.ids]
            sounding = isinstance(segment.medium, Pictured) and segment.medium.sounds
            pieces.append(segment.ids if sounding else segment.medium)
    pieces.append([config.tts_pad_token_id] * OPENING)
    laid = lay_out_pieces(pieces, config.thinker)
    ids = [token for segment in laid for token in segment.ids]
    positions = torch.cat([segment.positions for segment in laid], 1)
    return UserRows(ids, rows, torch.tensor(medium, dtype=torch.bool), positions)


class Speaker:
    """Makes the Talker's inputs of what the Thinker has.

    Args:
        newline: the id of the end of a line, as it follows a role.

    Attributes:
        pad: the row that is given once there is no text left, `[hidden]`.
    """

    def __init__(self, thinker: Thinker, talker: Talker, config: OmniConfig, newline: int) -> None:
        self._thinker, self._talker = thinker, talker
        codec = talker.config
        device = talker.codec_embedding.weight.device
        marks = [config.tts_pad_token_id, config.tts_bos_token_id]
        header = [config.im_start_token_id, config.assistant_token_id, newline]
        projected = self.text([*marks, *header])
        self.pad, begin = projected[:2]
        self._header = projected[2:]
        codes = [codec.codec_nothink_id, codec.codec_think_bos_id, codec.codec_think_eos_id]
        ids = torch.tensor([*codes, codec.codec_pad_id, codec.codec_bos_id], device=device)
        said = talker.embed(ids)
        self._silent = self.pad + said[:3]
        self._begin = begin + said[3]
        self._first = said[4]

    def text(self, ids: Sequence[int]) -> Tensor:
        """Rows `[tokens, hidden]` of text."""
        device = self._talker.codec_embedding.weight.device
        rows = self._thinker.rows(torch.tensor(list(ids), dtype=torch.int64, device=device))
        return self._talker.text_projection(rows)

    def user(self, user: UserRows, rows: Tensor, accepted: Tensor) -> Tensor:
        """Rows `[len(user.rows), hidden]` of the user's turns.

        Args:
            rows: the Thinker's embeddings of those tokens, `[tokens, thinker_hidden]`.
            accepted: the Thinker's hidden states (`Thinker.accepted`) of those that stand for
                media, `[media tokens, thinker_hidden]`.
        """
        is_medium = user.is_medium.to(rows.device)
        out = self._talker.text_projection(rows)
        if len(accepted):
            out[is_medium] = self._talker.hidden_projection(accepted)
        return out

    def voice(self, speaker: int) -> Tensor:
        """The row `[hidden]` that chooses a voice."""
        device = self._talker.codec_embedding.weight.device
        return self.pad + self._talker.embed(torch.tensor(speaker, device=device))

    def opening(self, speaker: int, first: int) -> Tensor:
        """The rows `[OPENING, hidden]` after the user's.

        Args:
            speaker: id of the voice.
            first: the first token of the answer.
        """
        voice = self.voice(speaker)[None]
        begin = self.text([first]) + self._first
        return torch.cat([self._header, self._silent, voice, self._begin[None], begin])
