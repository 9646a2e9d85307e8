"""A loopback server that stands for the Internet, and a script for its names."""

from __future__ import annotations

import socket
import ssl
import threading

from tests.every_modality import picture

IMAGE = picture(8, 8, 3)
PUBLIC, PRIVATE = "127.0.0.1", "127.0.0.2"  # what these stand for


def answer(body: bytes = IMAGE, *headers: str, status: str = "200 OK", length: int | None = None):
    """An answer of HTTP."""
    length = len(body) if length is None else length
    head = [f"HTTP/1.1 {status}", f"Content-Length: {length}", *headers, "", ""]
    return ["\r\n".join(head).encode() + body]


def to(place: str, status: str = "302 Found") -> list[bytes]:
    return answer(b"secret", f"Location: {place}", status=status)


class Internet:
    """Answers by path, one thread per connection; remembers who was asked for what."""

    def __init__(self) -> None:
        self.answers: dict[str, object] = {"/a.png": answer()}
        self.requests: list[bytes] = []
        self.names = {"example.com": [PUBLIC]}
        self.lookups: list[str] = []
        self.context: ssl.SSLContext | None = None
        self.leaving = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, path: str = "/a.png", host: str = "example.com", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    def resolve(self, host: str, port: int) -> list:
        self.lookups.append(host)
        found = self.names.get(host)
        if found and isinstance(found[0], list):  # another answer each time
            found = found.pop(0)
        if not found:
            raise socket.gaierror(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (text, port)) for text in found]

    def close(self) -> None:
        self.leaving.set()
        self._listener.close()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(5)
                if self.context is not None:
                    connection = self.context.wrap_socket(connection, server_side=True)
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    request += connection.recv(65536) or b"\r\n\r\n"
                self.requests.append(request)
                path = request.split(b" ")[1].decode() if b" " in request else ""
                for piece in self.answers.get(path, answer(b"", status="404 Not Found")):
                    if isinstance(piece, float):
                        if self.leaving.wait(piece):
                            return
                    else:
                        connection.sendall(piece)
                connection.close()
        except OSError:
            pass
