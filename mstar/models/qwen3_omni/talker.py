"""The Talker: hears the Thinker's text and hidden states, and says frames of codes (arXiv
2509.17765, section 2.4).

The decoder says the first code of a frame; the code predictor completes the frame. What follows is
fed the sum of the frame's embeddings and the next row of text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.kvcache import KVLayout
from mstar.engine.layers.attention import AttentionContext
from mstar.engine.layers.linear import apply, linear
from mstar.engine.layers.weight import Weight
from mstar.models.qwen3_omni.code_predictor import CodePredictor
from mstar.models.qwen3_omni.config import TalkerConfig
from mstar.models.qwen3_omni.decoder import Decoder

__all__ = ["Talker"]

_UNSPOKEN = 1024  # ids at the end of the vocabulary that stand for no sound


class Talker(nn.Module):
    """The decoder with its embeddings, its head, and the projections of what the Thinker gives."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.config = config
        text = config.text
        self.codec_embedding = Weight(text.vocab_size, text.hidden_size)
        self.decoder = Decoder(text)
        self.codec_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.text_projection = _Projection(config)
        self.hidden_projection = _Projection(config)
        self.code_predictor = CodePredictor(config.code_predictor, config.num_code_groups)
        with torch.device("cpu"):
            silent = torch.arange(text.vocab_size) >= text.vocab_size - _UNSPOKEN
            silent[config.codec_eos_token_id] = False
        self.register_buffer("silent", silent, persistent=False)

    @property
    def kv_layout(self) -> KVLayout:
        """What one token keeps in the cache."""
        return self.decoder.kv_layout

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.config.text.vocab_size

    def embed(self, ids: Tensor) -> Tensor:
        """Embedding rows `[..., hidden]` of ids of the codec vocabulary `[...]`."""
        return F.embedding(ids, self.codec_embedding.weight)

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        context: AttentionContext | None = None,
    ) -> Tensor:
        """Normed hidden states `[tokens, hidden]`.

        Args:
            inputs: embeddings `[tokens, hidden]`, or ids int `[tokens]`.
            positions: `[tokens]` or `[3, tokens]` (see `MRotary`); counted from 0 if left out.
            context: where earlier keys and values are; none if left out.
        """
        x = inputs if inputs.is_floating_point() else self.embed(inputs)
        return self.decoder(x, positions, context)[0]

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores float32 `[tokens, vocab]` of normed hidden states `[tokens, hidden]`."""
        return linear(hidden, self.codec_head.weight).float()

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of codes and of the end; -inf for ids that are never said."""
        return self.scores(hidden).masked_fill(self.silent, -torch.inf)

    def frame_inputs(self, codes: Tensor, text: Tensor) -> Tensor:
        """Inputs `[frames, hidden]` of the step after a frame.

        Args:
            codes: of the frame, `[frames, groups]`.
            text: the rows of text to be said there, `[frames, hidden]`.
        """
        return self.embed(codes[:, 0]) + self.code_predictor.embedded(codes[:, 1:]) + text


class _Projection(nn.Module):
    """From the Thinker's width to the Talker's."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        inner = config.text.intermediate_size
        self.linear_fc1 = nn.Linear(config.thinker_hidden_size, inner)
        self.linear_fc2 = nn.Linear(inner, config.text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.linear_fc2, F.silu(apply(self.linear_fc1, x)))
