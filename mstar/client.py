"""The generating methods that `Engine` and the HTTP clients share, and the names that go with them.

`MStarClient` is here, too. Needs requests and numpy only: neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mstar import errors, types
from mstar.async_client import AsyncMStarClient
from mstar.errors import *  # noqa: F403
from mstar.errors import RequestFailed
from mstar.form import Form, make_form
from mstar.transport import Deadline, Server, broken, refusal, unreachable
from mstar.types import *  # noqa: F403
from mstar.types import AudioBuffer, Event, GenerateResult
from mstar.wire import RawChunk, Reply, image_of, sound_of

if TYPE_CHECKING:
    import requests

__all__ = ["AsyncMStarClient", "GenerateMethods", "MStarClient", "RawChunk"]
__all__ += errors.__all__
__all__ += types.__all__


class GenerateMethods:
    """One vocabulary, whether the model runs in this process or behind HTTP.

    Everything is said in terms of `generate`, and that in terms of `_generate`. Media is a path,
    raw bytes, `(filename, bytes)`, or a list of those.
    """

    def generate(
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
    ) -> GenerateResult | Iterator[Event]:
        """Run one request.

        `None` values are dropped.

        Args:
            text: the prompt. Chat models take `messages=[{"role", "content"}]` instead.
            images, audio, video: a path, bytes, `(filename, bytes)`, or a list of those; an Engine
                also takes PIL images and arrays (audio as `(samples, sample_rate)`).
            output_modalities: what to make; if left out what the model is for: text, if it can.
            input_modalities: the order of the given parts, where it matters.
            stream: return an iterator of events; closing or dropping it cancels the request.
            request_id: unique among the live requests; made up if left out.
            timeout: seconds after which `RequestTimeout` is raised.
            **model_kwargs: parameters of the model (`mstar models NAME` lists them).

        Returns:
            The folded result, or the iterator.

        Raises:
            InvalidRequest: an input or a parameter is not accepted.
            EngineOverloaded: too many requests are waiting; a server may say for how many seconds,
                as `retry_after`.
            EngineClosed: no more requests are taken, or the server cannot be reached.
            RequestTimeout: the deadline passed, or the server was silent for too long.
            RequestFailed: the model failed while it served this request, or the connection was
                lost.
        """
        return self._generate(
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

    def _generate(self, *, stream: bool, **request: Any) -> GenerateResult | Iterator[Event]:
        raise NotImplementedError

    def chat(
        self,
        prompt: str,
        *,
        images: Any = None,
        audio: Any = None,
        output_modalities: Sequence[str] = ("text",),
        stream: bool = False,
        **kwargs: Any,
    ) -> GenerateResult | Iterator[Event]:
        """Answer a prompt, with pictures and sound beside it."""
        return self.generate(
            text=prompt,
            output_modalities=output_modalities,
            stream=stream,
            **_given(images=images, audio=audio, **kwargs),
        )

    def generate_image(self, prompt: str, **kwargs: Any) -> bytes:
        """Paint one image and return it as PNG; `generate` returns all where there are several."""
        return image_of(self._whole(prompt, "image", kwargs))

    def tts(self, text: str, *, voice: str | None = None, **kwargs: Any) -> AudioBuffer:
        """Speak `text`."""
        return sound_of(self._whole(text, "audio", {"voice": voice, **kwargs}))

    def stream(self, **kwargs: Any) -> Iterator[Event]:
        """`generate(stream=True)`: the events of a request as they come.

        The last event is empty and carries `finish_reason` and `usage`.
        """
        return self.generate(stream=True, **_given(**kwargs))

    def _whole(self, text: str, modality: str, kwargs: dict[str, Any]) -> GenerateResult:
        """The complete result of a request for one modality."""
        return self.generate(
            text=text, output_modalities=(modality,), stream=False, **_given(**kwargs)
        )


class MStarClient(GenerateMethods):
    """A model behind HTTP: any server that speaks the native route (`POST /generate`).

    Has the generating methods of `Engine`; may be used from several threads.

    Args:
        base_url: where the server is.
        timeout: longest silence of the server in seconds. A `timeout=` given to a generating method
            limits that whole request instead, as it does with `Engine`.
        api_key: sent as `Authorization: Bearer`.
        connect_timeout: longest time to connect, in seconds.
        session: a `requests.Session` of your own (proxies, certificates, ...); it is not closed.

    Raises:
        InvalidRequest: an argument is not accepted.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        timeout: float = 600.0,
        api_key: str | None = None,
        *,
        connect_timeout: float = 10.0,
        session: requests.Session | None = None,
    ) -> None:
        self._server = Server(base_url, timeout, api_key, connect_timeout)
        self.base_url, self.timeout = self._server.base_url, self._server.timeout
        self._own_session = session is None
        self._session = _new_session() if session is None else session

    def _generate(self, *, stream: bool, **request: Any) -> GenerateResult | Iterator[Event]:
        form = make_form(stream=stream, **request)
        reply = Reply(self._server.generate_url, stream, form.request_id)
        events = self._events(form, reply)
        next(events)  # up to the header of the reply: a refusal is raised here
        if stream:
            return events
        for _ in events:
            pass
        return reply.whole()

    def health(self) -> dict[str, str]:
        """What the server says of itself: `{"status": "healthy"}`.

        Raises:
            EngineClosed: the server cannot be reached, is not ready, or is shutting down.
        """
        url = self._server.health_url
        deadline = Deadline(self._server.connect_timeout)
        reply = Reply(url, stream=False)
        with self._typed(reply, deadline):
            response = self._session.get(
                url,
                headers=self._server.headers(),
                auth=self._server.authorize,
                timeout=self._server.timeouts(deadline),
                allow_redirects=False,
            )
        return self._server.health_of(response.status_code, response.headers, response.content)

    def close(self) -> None:
        """Close the connections. May be called twice."""
        if self._own_session:
            self._session.close()

    def __enter__(self) -> MStarClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _events(self, form: Form, reply: Reply) -> Iterator[Any]:
        """`None` once the server has accepted the request, then the events."""
        deadline = Deadline(form.timeout)
        with self._typed(reply, deadline):
            response = self._session.post(
                reply.url,
                data=form.body,
                headers=self._server.headers(form),
                auth=self._server.authorize,
                timeout=self._server.timeouts(deadline),
                allow_redirects=False,
                stream=True,
            )
        try:
            pieces = self._pieces(response, reply, deadline)
            if response.status_code != 200:
                body = b"".join(pieces)
                raise refusal("POST", reply.url, response.status_code, response.headers, body)
            reply.begin(response.headers)
            yield None
            for piece in pieces:
                yield from reply.feed(piece)
            yield from reply.finish()
        finally:
            response.close()

    def _pieces(
        self, response: requests.Response, reply: Reply, deadline: Deadline
    ) -> Iterator[bytes]:
        """The body as it comes."""
        raw = response.raw
        if raw.chunked or not hasattr(raw, "read1"):
            pieces = raw.stream(None if raw.chunked else 1, decode_content=True)
        else:
            pieces = iter(lambda: raw.read1(65536, decode_content=True), b"")
        while True:
            try:
                with self._typed(reply, deadline):
                    _, silence = self._server.timeouts(deadline)
                    socket = getattr(getattr(raw, "connection", None), "sock", None)
                    if socket is not None:
                        socket.settimeout(silence)
                    piece = next(pieces, None)
            except RequestFailed:
                if reply.done:  # nothing was lost
                    return
                raise
            if piece is None:
                return
            yield piece

    @contextlib.contextmanager
    def _typed(self, reply: Reply, deadline: Deadline) -> Iterator[None]:
        """Errors of the transport, as ours."""
        import requests
        from urllib3 import exceptions

        try:
            yield
        except requests.ConnectTimeout as error:
            raise reply.late(deadline, self._server.connect_timeout) from error
        except (requests.Timeout, exceptions.TimeoutError, TimeoutError) as error:
            raise reply.late(deadline, self.timeout) from error
        except (requests.RequestException, exceptions.HTTPError, OSError) as error:
            reason = getattr(error.args[0] if error.args else None, "reason", None)
            failed = isinstance(reason, (exceptions.NewConnectionError, exceptions.SSLError))
            failed = failed or isinstance(error, requests.exceptions.ProxyError)
            raise (unreachable if failed else broken)(reply.url, error) from error


def _new_session() -> requests.Session:
    import requests

    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=64))
    return session


def _given(**kwargs: Any) -> dict[str, Any]:
    """The arguments that are not `None`."""
    return {name: value for name, value in kwargs.items() if value is not None}
