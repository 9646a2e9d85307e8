"""A chat request, read: what the engine is to do, and how the answer is to look."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mstar.errors import InvalidRequest
from mstar.http.encoders import FORMATS, check_encoder
from mstar.http.fields import deadline
from mstar.http.front import Front
from mstar.http.messages import read_messages
from mstar.http.openai.chat_fields import PARAMETER_FIELDS, SHAPE, parameter_of, parameter_values
from mstar.http.openai.common import flat, model_parameters, renamed, unsupported, voice_of
from mstar.http.openai.models import check_model
from mstar.models.card import ModelCard

__all__ = ["ChatAsk", "chat_ask"]

_SHAPING = (
    *("model", "messages", "modalities", "audio", "n", "stream", "stream_options"),
    *("response_format", "service_tier", "timeout"),
    *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
)
# Arguments of the engine that come from the messages.
_FIELD_OF = dict.fromkeys(("text", "images", "audio", "video"), "messages")
_AUDIO_FORMATS = {"pcm16": "pcm", **{name: name for name in FORMATS if name != "pcm"}}
_OPTIONS = ("include_usage", "include_obfuscation", "continuous_usage_stats")


@dataclass
class ChatAsk:
    """What a request asks for.

    Args:
        model: the name by which the model was called.
        arguments: of `Engine.submit`, once per choice; the same but for the seed.
        field_of: parameter of the model -> field of the request that sets it.
        modalities: what the reply may hold.
        audio_format: one of `encoders.FORMATS`, where it holds sound.
        logprobs: whether the tokens' probabilities are asked for.
        stream: whether the answer is a stream.
        include_usage: whether it ends with a chunk that holds the usage.
        running_usage: whether every chunk holds the usage so far.
    """

    model: str
    arguments: list[dict[str, Any]]
    field_of: dict[str, str]
    modalities: tuple[str, ...] = ("text",)
    audio_format: str | None = None
    logprobs: bool = False
    stream: bool = False
    include_usage: bool = False
    running_usage: bool = False

    def renamed(self, error: Exception) -> Exception:
        """An error about a parameter of the model, in the words of the request."""
        return renamed(error, {**_FIELD_OF, **self.field_of})


def chat_ask(
    front: Front,
    replies: tuple[str, ...],
    fields: dict[str, Any],
    header: str | None,
    spoken: Callable[[str], str | None],
) -> ChatAsk:
    """Read a request. Media in its messages are still to be brought: see `http.messages`.

    Args:
        replies: the modalities that a reply may hold.
        fields: the JSON object.
        header: the deadline in a header.
        spoken: what was said in an earlier reply of sound, by its id.

    Raises:
        InvalidRequest, Refused: a field is not what it must be, or cannot be honoured.
    """
    card = front.card
    fields = flat(fields)
    model = check_model(front, fields.get("model"))
    _check_tools(card, fields)
    _check_format(card, fields)
    shape = {one.name: one.check(fields.get(one.name, one.default)) for one in SHAPE}
    values, field_of = parameter_values(card, fields)
    stream = shape["stream"]
    modalities = _modalities(card, replies, fields.get("modalities"))
    rate = front.engine.model.sample_rate
    format, voice = _audio(fields.get("audio"), modalities, stream, rate)
    own = parameter_of(card, "voice")
    if voice is not None and own is not None:
        values[own], field_of[own] = voice, "audio.voice"
    extras = _extras(card, fields, field_of)
    try:
        card.parameters.validate({**extras, **values})
    except InvalidRequest as error:
        raise renamed(error, field_of) from None
    longest = front.settings.max_text_chars
    messages = read_messages(card, fields.get("messages"), longest=longest, spoken=spoken)
    arguments = {
        **extras,
        **values,
        "messages": messages,
        "output_modalities": modalities,
        "stream": stream,
        "timeout": deadline(front.settings, header, fields.get("timeout")),
    }
    seed = parameter_of(card, "seed")
    options = _stream_options(fields.get("stream_options"), stream)
    return ChatAsk(
        model=model,
        arguments=[_seeded(arguments, seed, index) for index in range(shape["n"])],
        field_of=field_of,
        modalities=modalities,
        audio_format=format,
        logprobs=fields.get("logprobs", False),
        stream=stream,
        include_usage=options.get("include_usage", False),
        running_usage=options.get("continuous_usage_stats", False),
    )


def _extras(card: ModelCard, fields: dict[str, Any], field_of: dict[str, str]) -> dict[str, Any]:
    """Parameters of the model under their own names."""
    extras = model_parameters(card, fields, {*_SHAPING, *PARAMETER_FIELDS})
    for name in extras:
        other = field_of.get(card.parameters[name].name)
        if other is not None:
            raise InvalidRequest(name, extras[name], f"says the same as {other}: give only one")
    field_of |= {card.parameters[name].name: name for name in extras}
    return extras


def _seeded(arguments: dict[str, Any], seed: str | None, index: int) -> dict[str, Any]:
    """The arguments of one choice: a seed that is given counts up from the first choice on."""
    if seed is None or arguments.get(seed) is None:
        return dict(arguments)
    return {**arguments, seed: arguments[seed] + index}


def _check_tools(card: ModelCard, fields: Mapping[str, Any]) -> None:
    allowed = f"{card.name} calls no tools"
    for name in ("tools", "functions"):
        if name in fields and fields[name] != []:
            raise unsupported(name, fields[name], allowed)
    for name in ("tool_choice", "function_call"):
        if fields.get(name, "none") not in ("none", "auto"):
            raise unsupported(name, fields[name], allowed)


def _check_format(card: ModelCard, fields: Mapping[str, Any]) -> None:
    value = fields.get("response_format", {"type": "text"})
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("json_object", "json_schema"):
        raise unsupported("response_format", value, f"{card.name} is not held to a format")
    if kind != "text":
        raise InvalidRequest("response_format", value, 'must be {"type": "text"}')


def _modalities(card: ModelCard, replies: tuple[str, ...], value: Any) -> tuple[str, ...]:
    if value is None:
        return ("text",)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidRequest("modalities", value, "must be a list of strings")
    made = ", ".join(replies)
    for item in value:
        if item not in replies:
            raise unsupported("modalities", item, f"replies of {card.name} hold {made} only")
    if "text" not in value:
        raise InvalidRequest("modalities", value, 'must hold "text"')
    return tuple(name for name in replies if name in value)


def _audio(
    value: Any, modalities: tuple[str, ...], stream: bool, rate: int | None
) -> tuple[str | None, str | None]:
    """The format of the sound and its voice."""
    if value is not None and not isinstance(value, dict):
        raise InvalidRequest("audio", value, 'must be {"voice": ..., "format": ...}')
    voice = voice_of((value or {}).get("voice"), "audio.voice")
    format = (value or {}).get("format")
    if not isinstance(format, (str, type(None))) or format not in (None, *_AUDIO_FORMATS):
        allowed = f"must be one of {', '.join(_AUDIO_FORMATS)}"
        raise InvalidRequest("audio.format", format, allowed)
    if "audio" not in modalities:
        if value:
            raise InvalidRequest("audio", value, 'needs modalities=["text", "audio"]')
        return None, None
    if stream and format not in (None, "pcm16"):
        raise InvalidRequest("audio.format", format, "must be pcm16 in a stream")
    own = _AUDIO_FORMATS[format or ("pcm16" if stream else "wav")]
    check_encoder(own, rate, field="audio.format")
    return own, voice


def _stream_options(value: Any, stream: bool) -> dict[str, bool]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest("stream_options", value, "must be an object")
    if not stream:
        raise InvalidRequest("stream_options", value, "needs stream=true")
    for name in _OPTIONS:
        if not isinstance(value.get(name) or False, bool):
            raise InvalidRequest(f"stream_options.{name}", value[name], "must be true or false")
    return {name: bool(value.get(name)) for name in _OPTIONS}
