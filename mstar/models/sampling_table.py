"""The parameters that every model with a text decoder lets its user set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mstar.models.parameters import Parameter, plain

__all__ = ["is_list", "logit_bias", "sampling_table", "stop_strings", "token_ids"]

_MOST_STOPS = 16
_LARGEST_ID = 2**31 - 1


def stop_strings(value: Any) -> list[str]:
    """`stop` as a list: one string, or up to 16 of them."""
    strings = list(value) if is_list(value) else [value]
    if not all(isinstance(text, str) and text for text in strings):
        raise ValueError("must be a string that is not empty, or a list of such")
    if len(strings) > _MOST_STOPS:
        raise ValueError(f"at most {_MOST_STOPS} stop strings, not {len(strings)}")
    return strings


def token_ids(value: Any) -> list[int]:
    """`stop_token_ids` as a list of up to 16 ids."""
    ids = [plain(item) for item in value] if is_list(value) else [plain(value)]
    if not all(_is_id(item) for item in ids):
        raise ValueError(f"must be token ids: integers from 0 to {_LARGEST_ID}")
    if len(ids) > _MOST_STOPS:
        raise ValueError(f"at most {_MOST_STOPS} stop tokens, not {len(ids)}")
    return ids


def logit_bias(value: Any, token_id: Callable[[Any], int] | None = None) -> dict[int, float]:
    """`logit_bias` as token id -> number; ids may be strings, as they are in JSON.

    Args:
        token_id: reads what a family accepts as a token; ids only if left out.
    """
    if not isinstance(value, Mapping):
        raise ValueError("must be an object of token id -> number from -100 to 100")
    biases: dict[int, float] = {}
    for key, number in value.items():
        key = int(key) if isinstance(key, str) and key.isdecimal() else plain(key)
        token = (token_id or _checked_id)(key)
        bias = plain(number)
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of {key!r} must be a number from -100 to 100, not {bias!r}")
        if token in biases:
            raise ValueError(f"token {token} is given twice")
        biases[token] = float(bias)
    return biases


def sampling_table(
    prefix: str = "",
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    what: str = "text",
) -> list[Parameter]:
    """The table, with the defaults of a family. All names begin with `prefix`.

    Args:
        what: is sampled, for the help.
    """

    def parameter(name: str, *args: Any, **kwargs: Any) -> Parameter:
        return Parameter(prefix + name, *args, **kwargs)

    return [
        parameter(
            "temperature",
            float,
            temperature,
            low=0,
            high=100,
            help=f"spread of the sampling of {what}; 0 is greedy",
        ),
        parameter(
            "top_p",
            float,
            top_p,
            low=0,
            high=1,
            low_open=True,
            help="sample from the likeliest tokens that make up this probability",
        ),
        parameter(
            "top_k",
            int,
            top_k,
            low=0,
            high=_LARGEST_ID,
            help="sample from this many likeliest tokens; 0 means all",
        ),
        parameter(
            "min_p",
            float,
            0.0,
            low=0,
            high=1,
            help="drop tokens below this fraction of the likeliest one's probability",
        ),
        parameter(
            "repetition_penalty",
            float,
            repetition_penalty,
            low=0.01,
            high=100,
            help="divides the logits of tokens seen so far",
        ),
        parameter(
            "presence_penalty",
            float,
            0.0,
            low=-2,
            high=2,
            help="subtracted from the logits of tokens generated before",
        ),
        parameter(
            "frequency_penalty",
            float,
            0.0,
            low=-2,
            high=2,
            help="subtracted once for every time that the token was generated",
        ),
        parameter(
            "logit_bias",
            logit_bias,
            accepts="an object of token id -> number from -100 to 100",
            help="added to the logits of single tokens",
        ),
        parameter(
            "min_tokens", int, 0, low=0, high=_LARGEST_ID, help="no end before this many tokens"
        ),
        parameter(
            "stop",
            stop_strings,
            accepts="a string, or a list of up to 16 of them",
            help="strings that end the text; they are not part of it",
        ),
        parameter(
            "stop_token_ids",
            token_ids,
            accepts="a token id, or a list of up to 16 of them",
            help="tokens that end it, beside the model's own",
        ),
        parameter("ignore_eos", bool, False, help="go on after the end (for benchmarks)"),
        parameter(
            "logprobs",
            int,
            low=0,
            high=20,
            help="tell how likely each token was, and this many of the likeliest",
        ),
    ]


def is_list(value: Any) -> bool:
    """Whether something holds several values, and is neither a string nor an object."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_ID


def _checked_id(value: Any) -> int:
    if not _is_id(value):
        raise ValueError(f"{value!r} is not a token id")
    return value
