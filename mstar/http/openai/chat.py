"""`POST /v1/chat/completions`: a conversation, answered in one piece or as it is made."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mstar.errors import InvalidRequest
from mstar.http.body import read_json
from mstar.http.front import Front, off_loop
from mstar.http.messages import with_media
from mstar.http.openai.chat_fields import FIELDS
from mstar.http.openai.chat_reply import completion
from mstar.http.openai.chat_request import ChatAsk, chat_ask
from mstar.http.openai.chat_stream import completion_chunks
from mstar.http.openai.common import schema_of
from mstar.http.openai.kept import Kept
from mstar.http.record import record_of
from mstar.http.stream import streamed

__all__ = ["chat_routes"]

_STRING, _OBJECT = {"type": "string"}, {"type": "object"}
_SCHEMA = {
    "type": "object",
    "required": ["model", "messages"],
    "properties": {
        "model": _STRING,
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role"],
                "properties": {
                    "role": {"enum": ["developer", "system", "user", "assistant", "tool"]},
                    "content": {"anyOf": [_STRING, {"type": "array", "items": _OBJECT}]},
                },
            },
        },
        "stream_options": _OBJECT,
        "modalities": {"type": "array", "items": _STRING},
        "audio": _OBJECT,
        **schema_of(FIELDS),
        "stop": {"anyOf": [_STRING, {"type": "array", "items": _STRING, "maxItems": 4}]},
    },
}
_CONTENT = {"application/json": {"schema": _SCHEMA}}


def chat_routes(front: Front, replies: tuple[str, ...]) -> APIRouter:
    """The chat route of a model that converses."""
    router = APIRouter()
    transcripts: Kept[str] = Kept(4096, 16 * 2**20)

    @router.post("/v1/chat/completions", openapi_extra={"requestBody": {"content": _CONTENT}})
    async def chat(request: Request) -> Response:
        """Go on with the conversation in `messages`."""
        front.check_open()
        fields = await read_json(front, request)
        ask = await _ask(front, replies, request, fields, transcripts)
        modalities = ",".join(ask.modalities)
        record_of(request.scope).note(streaming=ask.stream, n=len(ask.arguments), made=modalities)
        try:
            if not ask.stream:
                return await completion(front, request, ask, transcripts)
            chunks = completion_chunks(front, request, ask, transcripts)
            return await streamed(chunks, "text/event-stream")
        except InvalidRequest as error:
            raise ask.renamed(error) from None

    return router


async def _ask(
    front: Front,
    replies: tuple[str, ...],
    request: Request,
    fields: dict[str, Any],
    transcripts: Kept[str],
) -> ChatAsk:
    header = request.headers.get("x-request-timeout")
    args = (front, replies, fields, header, transcripts.get)
    ask = await off_loop(chat_ask, *args, size=record_of(request.scope).held)
    messages = await with_media(front, ask.arguments[0]["messages"])
    for arguments in ask.arguments:
        arguments["messages"] = messages
    return ask
