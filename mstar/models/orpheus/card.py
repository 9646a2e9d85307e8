"""The card of Orpheus: text to speech, a Llama decoder that speaks through the SNAC codec."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter, Parameters, demand, plain
from mstar.models.sampling_table import is_list, logit_bias, sampling_table

__all__ = ["CARD", "MOST_TOKENS", "VOICES"]

VOICES = ("tara", "leah", "jess", "leo", "dan", "mia", "zac", "zoe", "julia")

VOCAB_SIZE = 156940
CUSTOM_TOKEN_0 = 128256
NAMED_TOKENS = {"<|begin_of_text|>": 128000, "<|eot_id|>": 128009}
MAX_CONTEXT = 131072
MOST_TOKENS = 4096  # of an utterance, where the user sets no limit: 50 seconds
MAX_STOPS = 16


def token_id(value: Any) -> int:
    """The id of a token given as such or by its string (`"<custom_token_2>"` is 128258)."""
    if isinstance(value, str):
        custom = re.fullmatch(r"<custom_token_(\d{1,5})>", value)
        number = CUSTOM_TOKEN_0 + int(custom[1]) if custom else NAMED_TOKENS.get(value, -1)
    else:
        number = value if isinstance(value, int) and not isinstance(value, bool) else -1
    if not 0 <= number < VOCAB_SIZE:
        raise ValueError(
            f"{value!r} is not a token: an id from 0 to {VOCAB_SIZE - 1}, '<custom_token_N>' with "
            f"N from 0 to {VOCAB_SIZE - CUSTOM_TOKEN_0 - 1}, or one of {', '.join(NAMED_TOKENS)}"
        )
    return number


def stop_ids(value: Any) -> list[int]:
    """`stop` as a list of token ids: one token, or up to 16 of them."""
    tokens = list(value) if is_list(value) else [value]
    if len(tokens) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop tokens, not {len(tokens)}")
    return [token_id(plain(token)) for token in tokens]


def biases(value: Any) -> dict[int, float]:
    """`logit_bias` as token id -> number."""
    return logit_bias(value, token_id)


def _together(values: dict[str, Any]) -> None:
    least, most = values["min_tokens"], values["max_output_tokens"]
    most = MOST_TOKENS if most is None else most
    demand(least <= most, "min_tokens", least, f"must not exceed max_output_tokens={most}")


def _recognises(config: dict[str, Any]) -> bool:
    """A Llama whose vocabulary is Llama 3's 128,256 entries plus 28,684 `<custom_token_N>`.

    The published config.json says only "llama"; no field names Orpheus. The extended vocabulary
    (10 marks + 7 slots x 4096 codes + 2 spare) is what no other Llama has, and it is the same in
    every size, language and fine-tune, since the audio token ids depend on it.
    """
    return config.get("model_type") == "llama" and config.get("vocab_size") == VOCAB_SIZE


# Of the table that text models share: those that are tokens of speech here, or mean nothing.
_OWN = ("logit_bias", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "logprobs")

PARAMETERS = Parameters(
    "orpheus",
    [
        Parameter(
            "voice",
            str,
            "tara",
            choices=(*VOICES, ""),
            unless="force_voice",
            help="who speaks; the empty string leaves the voice to the model",
        ),
        Parameter(
            "force_voice", bool, False, help="accept voices that the published model does not know"
        ),
        *(
            parameter
            for parameter in sampling_table(
                temperature=0.6, top_p=0.8, repetition_penalty=1.3, what="speech"
            )
            if parameter.name not in _OWN
        ),
        Parameter(
            "max_output_tokens",
            int,
            low=1,
            high=MAX_CONTEXT,
            aliases=("max_tokens", "max_new_tokens"),
            help="longest output, of each utterance where the text is split; 82 tokens are one "
            f"second of speech. Null means {MOST_TOKENS}, or as many as the model has room for",
        ),
        Parameter(
            "min_tokens",
            int,
            0,
            low=0,
            high=MAX_CONTEXT,
            help="no end of speech before this many tokens",
        ),
        Parameter(
            "seed",
            int,
            low=0,
            high=2**63 - 1,
            help="same seed, same request: same speech",
        ),
        Parameter(
            "stop",
            stop_ids,
            accepts="a token id, '<custom_token_N>', or a list of up to 16 of them",
            help="tokens that end the speech, beside the model's own end of speech",
        ),
        Parameter("ignore_eos", bool, False, help="go on after the end of speech (for benchmarks)"),
        Parameter(
            "logit_bias",
            biases,
            accepts="an object of token id -> number from -100 to 100",
            help="added to the logits of single tokens",
        ),
        Parameter(
            "codec_noise",
            str,
            "seeded",
            choices=("seeded", "off"),
            help="the noise inputs of the codec: drawn from the seed, or left out",
        ),
        Parameter(
            "lookahead",
            int,
            3,
            low=0,
            high=3,
            help="frames (85 ms) of right context for the codec; 3 is exact, less is earlier. "
            "Where the text is split, 0 counts as 1: utterances fade into each other",
        ),
        Parameter(
            "split_text",
            bool,
            True,
            help="speak long text as several utterances of whole sentences, in parallel",
        ),
    ],
    check=_together,
)

_LANGUAGES = ("de", "fr", "zh", "hi", "ko", "es_it")

CARD = ModelCard(
    name="orpheus",
    title="Orpheus TTS 3B: expressive speech, nine voices, 24 kHz",
    entry="mstar.models.orpheus.model:Orpheus",
    inputs=("text",),
    outputs=("audio",),
    parameters=PARAMETERS,
    repos={"lm": "canopylabs/orpheus-3b-0.1-ft", "snac": "hubertsiuzdak/snac_24khz"},
    aliases=(
        "canopylabs/orpheus-3b-0.1-pretrained",
        *(
            f"canopylabs/3b-{language}-{stage}-research_release"
            for language in _LANGUAGES
            for stage in ("ft", "pretrain")
        ),
    ),
    tiny=Path(__file__).parent / "tiny",
    full=Path(__file__).parent / "full",
    recognises=_recognises,
)
