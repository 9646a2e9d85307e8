"""What one request saw, and when."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Bad", "Trace"]


class Bad(Exception):
    """The answer is not what it should be.

    Args:
        reason: a few words; failures with the same are counted together.
        message: what exactly.
    """

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


@dataclass
class Trace:
    """Times are seconds of `time.perf_counter`, taken when the bytes came out of the socket.

    `outcome` is `done`, `failed` (then `reason` is set) or `left` (the client went away by plan).
    """

    index: int
    outcome: str = "done"
    reason: str | None = None
    message: str | None = None
    status: int | None = None
    begun: float = 0.0  # the request is due
    connect: float | None = None  # seconds, where a connection was made for it
    sent: float | None = None  # its first byte is written
    end: float | None = None  # the last byte that matters has come
    text: list[float] = field(default_factory=list)
    audio: list[tuple[float, float]] = field(default_factory=list)  # and seconds of sound
    images: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)  # actions, latents, videos, previews
    audio_is_timed: bool = True  # False for compressed sound, whose length is not known
    prompt_tokens: int | None = None
    tokens: int | None = None  # made, as the server counts
    text_tokens: int | None = None  # of those, text
    finish_reason: str | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing came."""
        return not (self.text or self.audio or self.images or self.other)

    def fail(self, reason: str, message: str = "") -> None:
        """It went wrong."""
        self.outcome, self.reason, self.message = "failed", reason, message or reason
