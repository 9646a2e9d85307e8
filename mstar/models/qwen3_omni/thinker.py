"""The Thinker's decoder: reads text and what the encoders make of media, and writes text.

Media bring more than embeddings: features that are added after the first layers (DeepStack, Meng et
al., arXiv 2406.04334, section 3). They travel beside the embeddings, in rows of
`(1 + deepstack) * hidden`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstar.engine.kvcache import KVLayout
from mstar.engine.layers.attention import AttentionContext
from mstar.engine.layers.linear import linear
from mstar.engine.layers.weight import Weight
from mstar.models.qwen3_omni.decoder import Decoder
from mstar.models.qwen3_omni.sizes import DecoderConfig

__all__ = ["Thinker"]


class Thinker(nn.Module):
    """The decoder with its embeddings and its head.

    Args:
        deepstack: how many layers features of images are added after.
        tap: after how many layers the Talker takes hidden states; `None` without a Talker.
    """

    def __init__(self, config: DecoderConfig, deepstack: int, tap: int | None) -> None:
        super().__init__()
        self.config = config
        self.deepstack = deepstack
        self.tap = tap
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.decoder = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def kv_layout(self) -> KVLayout:
        """What one token keeps in the cache."""
        return self.decoder.kv_layout

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.config.vocab_size

    def rows(self, ids: Tensor) -> Tensor:
        """Embedding rows `[tokens, hidden]` of ids `[tokens]`."""
        return F.embedding(ids, self.embed_tokens.weight)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows like those of media, `[tokens, (1 + deepstack) * hidden]`, of ids `[tokens]`."""
        return self.wide(self.rows(ids))

    def wide(self, rows: Tensor, features: Sequence[Tensor] = ()) -> Tensor:
        """Inputs `[tokens, (1 + deepstack) * hidden]`.

        Args:
            rows: embeddings `[tokens, hidden]`: of text, or what an encoder gave.
            features: what is added after the first layers, each like the rows; none for sounds.
        """
        if features:
            return torch.cat([rows, *features], -1)
        return F.pad(rows, (0, self.deepstack * rows.shape[-1]))

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        context: AttentionContext | None = None,
    ) -> Tensor:
        """Run the layers and the final norm.

        Args:
            inputs: ids int `[tokens]`, embeddings `[tokens, hidden]`, or those of `wide`.
            positions: `[tokens]` or `[3, tokens]` (see `MRotary`); counted from 0 if left out.
            context: where earlier keys and values are; none if left out.

        Returns:
            Normed hidden states `[tokens, hidden]`; where the inputs are wide and there is a
            Talker, with the hidden states that it takes beside them, `[tokens, 2 * hidden]`.
        """
        size = self.config.hidden_size
        x = inputs if inputs.is_floating_point() else self.rows(inputs)
        is_wide = x.shape[-1] > size
        x, *extra = x.split(size, -1)
        tap = self.tap if is_wide else None
        hidden, tapped = self.decoder(x.contiguous(), positions, context, extra=extra, tap=tap)
        return hidden if tapped is None else torch.cat([hidden, tapped], -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores float32 `[tokens, vocab]` of what `forward` returned."""
        return linear(hidden[..., : self.config.hidden_size], self.lm_head.weight).float()

    def accepted(self, hidden: Tensor) -> Tensor:
        """The hidden states for the Talker `[tokens, hidden]` in what `forward` returned."""
        return hidden[..., self.config.hidden_size :]
