"""Text as it is generated: tokens to whole characters, ended by stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mstar.engine.lm import Generation
from mstar.engine.logprobs import TokenScores
from mstar.engine.request import Request
from mstar.engine.sampling import SamplingParams
from mstar.io.text import TextStream

__all__ = ["TextGeneration", "described_scores", "sampling_params"]

_PLAIN = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "min_tokens", "logprobs"),
)


def sampling_params(
    values: Mapping[str, Any],
    *,
    prefix: str = "",
    max_tokens: int,
    end_ids: Iterable[int],
    seed: int,
) -> SamplingParams:
    """What the decoder needs of the validated values of a `sampling_table`.

    Args:
        end_ids: the model's own ends, unless `ignore_eos` is set.
    """
    ends = set(values[prefix + "stop_token_ids"] or ())
    if not values[prefix + "ignore_eos"]:
        ends.update(end_ids)
    return SamplingParams(
        **{name: values[prefix + name] for name in _PLAIN},
        logit_bias=values[prefix + "logit_bias"] or {},
        max_tokens=max_tokens,
        stop_ids=frozenset(ends),
        seed=seed,
    )


class TextGeneration:
    """Pieces of text of a `Generation`; `ids` are its tokens so far.

    `finish_reason` says why it ended, once it has.

    Args:
        tokens: from `LanguageModel.generate`.
        decode: token ids to text, without special tokens.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(
        self,
        tokens: Generation,
        decode: Callable[[Sequence[int]], str],
        stop: str | Sequence[str] = (),
    ) -> None:
        self.finish_reason: str | None = None
        self.ids: list[int] = []
        self._tokens = tokens
        self._decode = decode
        self._text = TextStream(decode, stop)
        self._told = 0
        self._given = 0  # characters

    def shown_ids(self) -> list[int]:
        """The tokens without those that a stop string, or part of it, is in."""
        count = len(self.ids)
        while count and len(self._decode(self.ids[:count])) > self._given:
            count -= 1
        return self.ids[:count]

    async def each(
        self, give: Callable[[str], None], hear: Callable[[int], None] | None = None
    ) -> None:
        """Call `give` with every piece, as soon as it is certain, and `hear` with every token."""
        text, tokens = self._text, aiter(self._tokens)
        async for token in tokens:
            self.ids.append(token)
            if hear is not None:
                hear(token)
            if piece := text.push(token):
                self._given += len(piece)
                give(piece)
            if text.stopped:
                break
        await tokens.aclose()
        if not text.stopped and (piece := text.finish()):
            self._given += len(piece)
            give(piece)
        self.finish_reason = "stop" if text.stopped else self._tokens.finish_reason

    async def emit(self, request: Request, hear: Callable[[int], None] | None = None) -> None:
        """Give every piece to the caller as it comes; see `each`.

        With the parameter `logprobs`, the metadata of a piece tell of its tokens.
        """
        await self.each(lambda piece: request.emit_text(piece, **self._news()), hear)

    def _news(self) -> dict[str, Any]:
        fresh = self._tokens.scores[self._told :]
        self._told += len(fresh)
        return {"logprobs": described_scores(fresh, self._decode)} if fresh else {}


def described_scores(
    scores: Iterable[TokenScores], decode: Callable[[Sequence[int]], str]
) -> list[dict[str, Any]]:
    """Scores of tokens as plain data, in the form in which OpenAI's clients read them.

    `bytes` is `None` where a token is only part of a character.
    """

    def described(token: int, logprob: float) -> dict[str, Any]:
        text = decode([token])
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": data}

    return [
        {**described(s.token, s.logprob), "top_logprobs": [described(*other) for other in s.top]}
        for s in scores
    ]
