"""`AsyncMStarClient`: the vocabulary of `MStarClient` for event loops, on httpx (extra `async`)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mstar.errors import RequestFailed
from mstar.form import Form, make_form
from mstar.transport import Deadline, Server, broken, refusal, unreachable
from mstar.types import AudioBuffer, Event, GenerateResult
from mstar.wire import Reply, image_of, sound_of

if TYPE_CHECKING:
    import httpx

__all__ = ["AsyncEventStream", "AsyncMStarClient"]


class AsyncMStarClient:
    """A model behind HTTP, for event loops: await the methods, `async for` over streams.

    Args: as of `MStarClient`; `session` is an `httpx.AsyncClient` of your own.

    Raises:
        ImportError: httpx is not installed.
        InvalidRequest: an argument is not accepted.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        timeout: float = 600.0,
        api_key: str | None = None,
        *,
        connect_timeout: float = 10.0,
        session: httpx.AsyncClient | None = None,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            how = "pip install 'mstar[async]'"
            raise ImportError(f"AsyncMStarClient needs httpx: {how}", name="httpx") from error
        self._server = Server(base_url, timeout, api_key, connect_timeout)
        self.base_url, self.timeout = self._server.base_url, self._server.timeout
        self._own_session = session is None
        if session is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            session = httpx.AsyncClient(limits=limits)
        self._session = session

    async def generate(
        self,
        *,
        text: str | None = None,
        images: Any = None,
        audio: Any = None,
        video: Any = None,
        output_modalities: Sequence[str] | None = None,
        input_modalities: Sequence[str] | None = None,
        stream: bool = False,
        request_id: str | None = None,
        **model_kwargs: Any,
    ) -> GenerateResult | AsyncEventStream:
        """`MStarClient.generate`, awaited. Cancelling the task cancels the request."""
        form = make_form(
            text=text,
            images=images,
            audio=audio,
            video=video,
            output_modalities=output_modalities,
            input_modalities=input_modalities,
            stream=stream,
            request_id=request_id,
            **model_kwargs,
        )
        reply = Reply(self._server.generate_url, form.stream, request_id)
        events = await AsyncEventStream(self._events(form, reply))
        if stream:
            return events
        async for _ in events:
            pass
        return reply.whole()

    async def chat(
        self,
        prompt: str,
        *,
        images: Any = None,
        audio: Any = None,
        output_modalities: Sequence[str] = ("text",),
        stream: bool = False,
        **kwargs: Any,
    ) -> GenerateResult | AsyncEventStream:
        """Answer a prompt, with pictures and sound beside it."""
        return await self.generate(
            text=prompt,
            images=images,
            audio=audio,
            output_modalities=output_modalities,
            stream=stream,
            **kwargs,
        )

    async def generate_image(self, prompt: str, **kwargs: Any) -> bytes:
        """Paint one image and return it as PNG; `generate` returns all where there are several."""
        return image_of(await self.generate(text=prompt, output_modalities=("image",), **kwargs))

    async def tts(self, text: str, *, voice: str | None = None, **kwargs: Any) -> AudioBuffer:
        """Speak `text`."""
        asked = {"output_modalities": ("audio",), "voice": voice, **kwargs}
        return sound_of(await self.generate(text=text, **asked))

    def stream(self, **kwargs: Any) -> AsyncEventStream:
        """The events of a request as they come: `async for event in client.stream(text=...)`."""

        async def events() -> AsyncIterator[Any]:
            async with await self.generate(stream=True, **kwargs) as stream:
                yield None
                async for event in stream:
                    yield event

        return AsyncEventStream(events())

    async def health(self) -> dict[str, str]:
        """What the server says of itself: `{"status": "healthy"}`.

        Raises:
            EngineClosed: the server cannot be reached, is not ready, or is shutting down.
        """
        url = self._server.health_url
        deadline = Deadline(self._server.connect_timeout)
        with self._typed(Reply(url, stream=False), deadline):
            response = await self._session.get(
                url, headers=self._server.headers(), timeout=self._timeouts(deadline)
            )
        return self._server.health_of(response.status_code, response.headers, response.content)

    async def close(self) -> None:
        """Close the connections. May be called twice."""
        if self._own_session:
            await self._session.aclose()

    async def __aenter__(self) -> AsyncMStarClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _events(self, form: Form, reply: Reply) -> AsyncIterator[Any]:
        """`None` once the server has accepted the request, then the events."""
        import anyio

        deadline = Deadline(form.timeout)
        with self._typed(reply, deadline):
            request = self._session.build_request(
                "POST",
                reply.url,
                content=form.body,
                headers=self._server.headers(form),
                timeout=self._timeouts(deadline),
            )
            with anyio.fail_after(deadline.left()):
                response = await self._session.send(request, stream=True, follow_redirects=False)
        try:
            if response.status_code != 200:
                body = b"".join([piece async for piece in self._pieces(response, reply, deadline)])
                raise refusal("POST", reply.url, response.status_code, response.headers, body)
            reply.begin(response.headers)
            yield None
            async for piece in self._pieces(response, reply, deadline):
                for event in reply.feed(piece):
                    yield event
            for event in reply.finish():
                yield event
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()

    async def _pieces(
        self, response: httpx.Response, reply: Reply, deadline: Deadline
    ) -> AsyncIterator[bytes]:
        """The body as it comes."""
        import anyio

        pieces = response.aiter_bytes()
        while True:
            try:
                with self._typed(reply, deadline), anyio.fail_after(deadline.left()):
                    piece = await anext(pieces, None)
            except RequestFailed:
                if reply.done:  # nothing was lost
                    return
                raise
            if piece is None:
                return
            yield piece

    def _timeouts(self, deadline: Deadline) -> httpx.Timeout:
        import httpx

        connect, silence = self._server.timeouts(deadline)
        return httpx.Timeout(silence, connect=connect, pool=None)

    @contextlib.contextmanager
    def _typed(self, reply: Reply, deadline: Deadline) -> Iterator[None]:
        """Errors of the transport, as ours."""
        import httpx

        try:
            yield
        except httpx.ConnectTimeout as error:
            raise reply.late(deadline, self._server.connect_timeout) from error
        except (httpx.TimeoutException, TimeoutError) as error:
            raise reply.late(deadline, self.timeout) from error
        except (httpx.ConnectError, httpx.ProxyError) as error:
            raise unreachable(reply.url, error) from error
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            raise broken(reply.url, error) from error


class AsyncEventStream(AsyncIterator[Event]):
    """The events of a request as they come; closing or dropping it early cancels the request.

    Awaiting it sends the request and waits until the server has accepted it; otherwise the first
    event does that.
    """

    def __init__(self, events: AsyncIterator[Any]) -> None:
        self._events = events
        self._begun = False

    def __await__(self) -> Generator[Any, None, AsyncEventStream]:
        return self._begin().__await__()

    def __aiter__(self) -> AsyncEventStream:
        return self

    async def __anext__(self) -> Event:
        await self._begin()
        return await anext(self._events)

    async def aclose(self) -> None:
        """Take no more events."""
        await self._events.aclose()

    async def __aenter__(self) -> AsyncEventStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _begin(self) -> AsyncEventStream:
        if not self._begun:
            self._begun = True
            await anext(self._events)
        return self
