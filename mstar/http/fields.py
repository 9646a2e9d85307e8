"""The fields of `POST /generate`, as arguments of `Engine.submit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mstar.errors import InvalidRequest, nearest
from mstar.http.body import Part, whole_json
from mstar.http.errors import Refused
from mstar.http.limits import check_media, moves
from mstar.http.messages import read_messages
from mstar.http.settings import Settings
from mstar.io.data_url import decode_data_url
from mstar.io.sniff import kind_of
from mstar.models.card import ModelCard
from mstar.models.parameters import Parameter

__all__ = ["FIELDS", "Ask", "ask_of", "check_text", "deadline"]

FIELDS = (
    "text",
    "files",
    "input_modalities",
    "output_modalities",
    "streaming",
    "model_kwargs",
    "request_id",
)
_STREAMING = Parameter("streaming", bool, True)
_MEDIA = {"image": "images", "audio": "audio", "video": "video"}
# Arguments of `Engine.submit` that have a field of their own. Media by any other way than a file
# would be a path on the server.
_RESERVED = (
    *("text", "images", "audio", "video", "stream", "request_id"),
    *("input_modalities", "output_modalities"),
)
_BESIDE = ("messages", "timeout")  # arguments that are neither parameters nor fields
_LONGEST_ID = 200


@dataclass
class Ask:
    """A request, read.

    Args:
        arguments: of `Engine.submit`.
        streaming: whether the answer is a stream.
        names: modality, or the name of a latent -> what the client calls it, where that differs.
    """

    arguments: dict[str, Any]
    streaming: bool = True
    names: dict[str, str] = field(default_factory=dict)


def ask_of(card: ModelCard, settings: Settings, parts: Sequence[Part]) -> Ask:
    """Read the parts of a form. Media in `messages` are still to be brought: see there.

    Raises:
        Refused, InvalidRequest: a field is not what it must be.
    """
    values = _single_values(parts)
    given = [part for part in parts if part.name in ("text", "files") and _is_there(part)]
    arguments = _model_kwargs(card, settings, values.get("model_kwargs", ""))
    if not given and "messages" not in arguments:
        raise InvalidRequest("text", None, "there is neither text nor a file")
    order, texts = [], []
    found = [_kind(part) for part in given if part.name == "files"]
    kinds = iter(_as_told(found, values.get("input_modalities")))
    for part in given:
        if part.name == "text":
            texts.append(check_text("text", part.text(), settings))
            order.append("text")
        else:
            kind = next(kinds)
            _check_file(settings, kind, part.data)
            arguments.setdefault(_MEDIA[kind], []).append(part.data)
            order.append(kind)
    if len(texts) > 1:
        raise InvalidRequest("text", f"{len(texts)} times", "must be given once")
    if texts:
        arguments["text"] = texts[0]
    if order:
        arguments["input_modalities"] = _order(values.get("input_modalities"), order)
    ask = Ask(arguments)
    if "streaming" in values:
        ask.streaming = _STREAMING.check(_STREAMING.parse(values["streaming"]))
    if "request_id" in values:
        arguments["request_id"] = _request_id(values["request_id"])
    if wanted := _words(values.get("output_modalities")):
        arguments["output_modalities"] = tuple(dict.fromkeys(wanted))
        ask.names = _latent_names(card, wanted)
        apart = ask.names and not {"video", "latent"} & set(wanted)
        if apart and "return_latents" in card.parameters:  # they are large
            arguments.setdefault("return_latents", False)
    arguments["stream"] = ask.streaming
    return ask


def _latent_names(card: ModelCard, wanted: Sequence[str]) -> dict[str, str]:
    """Other servers call latents `video`, the costs of candidates `tensor`, and `scalar` the
    number of the best one."""
    names = {"latent": "video", "costs": "tensor", "scalar": "scalar"}
    words = set(wanted).difference(card.outputs)
    told = {name: word for name, word in names.items() if word in words}
    return {"costs": "latent", **told} if told and "latent" in card.outputs else {}


def check_text(name: str, text: str, settings: Settings) -> str:
    """`text`, if it is neither empty nor enormous and can be encoded."""
    if not text.strip():
        raise InvalidRequest(name, text, "is empty")
    if len(text) > settings.max_text_chars:
        allowed = f"must be at most {settings.max_text_chars} characters"
        raise InvalidRequest(name, f"{len(text)} characters", allowed)
    if "\0" in text:
        raise InvalidRequest(name, text[:80], "must not hold NUL characters")
    return text


def deadline(settings: Settings, header: str | None, asked: Any = None) -> float | None:
    """Seconds for a request: what the client asks for, at most what the operator allows.

    Args:
        header: the value of `x-request-timeout`.
        asked: the field `timeout`, which goes before it.
    """
    seconds = _seconds("x-request-timeout", header) if asked is None else _seconds("timeout", asked)
    limits = [limit for limit in (seconds, settings.request_timeout) if limit is not None]
    return min(limits, default=None)


def _seconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value) if isinstance(value, (str, int, float)) else -1.0
    except (ValueError, OverflowError):
        seconds = -1.0
    if isinstance(value, bool) or not 0 < seconds < 10**8:
        raise InvalidRequest(name, value, "must be seconds above 0")
    return seconds


def _single_values(parts: Sequence[Part]) -> dict[str, str]:
    values: dict[str, str] = {}
    for part in parts:
        if part.name not in FIELDS:
            hint = nearest(part.name, FIELDS)
            message = f"{part.name!r:.80}: unknown field{hint}; parameters go into model_kwargs"
            raise Refused(400, message, param=part.name[:80])
        if part.name in ("text", "files"):
            continue
        if part.name in values:
            raise Refused(400, f"{part.name}='twice': must be given once", param=part.name)
        values[part.name] = part.text()
    return values


def _is_there(part: Part) -> bool:
    """Whether a part holds anything; forms in browsers send empty fields, too."""
    if part.name == "files" and not part.data and part.filename:
        raise InvalidRequest("files", part.filename[:80], "the file is empty")
    return bool(part.data)


def _kind(part: Part) -> str:
    kind = kind_of(part.data, part.filename)
    if kind not in _MEDIA:
        hint = "text goes into the field text" if kind == "text" else "its kind cannot be told"
        raise InvalidRequest("files", (part.filename or "")[:80], f"{hint}; {', '.join(_MEDIA)}")
    return kind


def _as_told(kinds: list[str], stated: str | None) -> list[str]:
    """The kinds of files, images as videos where the client says so: they may move."""
    told = [word for word in _words(stated) if word in _MEDIA]
    if len(set(told)) == 1:
        told = told[:1] * len(kinds)
    if len(told) != len(kinds) or sorted(told) == sorted(kinds):  # in whatever order
        return kinds
    pairs = zip(kinds, told, strict=True)
    return ["video" if pair == ("image", "video") else pair[0] for pair in pairs]


def _check_file(settings: Settings, kind: str, data: bytes) -> None:
    still = kind == "video" and kind_of(data) == "image" and not moves(data)
    check_media(settings, "image" if still else kind, data, "files")


def _model_kwargs(card: ModelCard, settings: Settings, text: str) -> dict[str, Any]:
    kwargs = whole_json(text, "model_kwargs") if text.strip() else {}
    for name in _RESERVED:
        if name in kwargs:
            message = f"{name}: does not go into model_kwargs: it has its own field"
            raise Refused(400, message, param=name)
    unknown = {k: v for k, v in kwargs.items() if k not in card.parameters and k not in _BESIDE}
    card.parameters.validate(unknown)
    for name, value in kwargs.items():
        text = name in _BESIDE or card.parameters[name].kind is str
        if isinstance(value, str) and not text:
            _check_url(settings, name, value)
    if kwargs.get("messages") is not None:
        longest = settings.max_text_chars
        kwargs["messages"] = read_messages(card, kwargs["messages"], longest=longest)
    return kwargs


def _check_url(settings: Settings, name: str, value: str) -> None:
    """Media in a parameter have the limits of files."""
    if value.startswith("data:"):
        data = decode_data_url(name, value)
        if (kind := kind_of(data)) in _MEDIA:
            check_media(settings, kind, data, name)


def _order(stated: str | None, order: list[str]) -> tuple[str, ...]:
    """What the client says about the parts, if it fits them, else what they are."""
    words = _words(stated)
    if words and set(words) != set(order):
        allowed = f"the parts are {', '.join(order)}"
        raise InvalidRequest("input_modalities", stated, allowed)
    return tuple(words or order)


def _words(text: str | None) -> list[str]:
    return [word for word in map(str.strip, (text or "").lower().split(",")) if word]


def _request_id(text: str) -> str:
    if not (0 < len(text) <= _LONGEST_ID and text.isascii() and text.isprintable()):
        allowed = f"must be 1 to {_LONGEST_ID} printable ASCII characters"
        raise Refused(400, f"request_id={text[:80]!r}: {allowed}", param="request_id")
    return text
