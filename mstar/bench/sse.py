"""Server-sent events, from pieces of a body cut anywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["SseEvent", "SseParser"]

_END_OF_LINE = re.compile(rb"\r\n|\r|\n")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class SseEvent:
    """One event: its name (`message` where none was given) and its data."""

    name: str
    data: str


class SseParser:
    """Follows the HTML standard (section 9.2.6): lines end in LF, CR or CRLF, a colon first makes a
    comment, several `data` lines are joined, an event without data is none.
    """

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._after_cr = False
        self._begun = False
        self._name = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[SseEvent]:
        """The events that `piece` completes."""
        if self._after_cr and piece:
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        if b"\n" not in piece and b"\r" not in piece:
            self._rest.append(piece)
            return []
        self._after_cr = piece.endswith(b"\r")
        *lines, rest = _END_OF_LINE.split(b"".join([*self._rest, piece]))
        self._rest = [rest]
        return [event for line in lines if (event := self._line(line)) is not None]

    def finish(self) -> list[SseEvent]:
        """What was still open at the end of the body; servers that forget the last blank line
        are understood."""
        line = b"".join(self._rest)
        self._rest = []
        events = [self._line(line)] if line else []
        return [event for event in [*events, self._line(b"")] if event is not None]

    def _line(self, line: bytes) -> SseEvent | None:
        if not self._begun:
            self._begun = True
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            self._data.append(text)
        elif name == b"event":
            self._name = text
        return None

    def _dispatch(self) -> SseEvent | None:
        name, data = self._name or "message", self._data
        self._name, self._data = "", []
        return SseEvent(name, "\n".join(data)) if data else None
