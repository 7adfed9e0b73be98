"""A web server on the loopback that serves a folder, counts what it is asked for, and misbehaves on request."""

from __future__ import annotations

import base64
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Fault = Callable[["_Handler", bytes], None]
"""Answers a request for these bytes in its own way."""


class Site:
    """What a server serves and how often each path was asked for."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.requests: Counter[str] = Counter()
        self._faults: defaultdict[str, deque[Fault]] = defaultdict(deque)

    def misbehave(self, path: str, *faults: Fault) -> None:
        """The next requests for ``path`` (or, for "*", of any) are answered so, one after the other."""
        self._faults[path].extend(faults)

    def fault(self, path: str) -> Fault | None:
        for name in (path, "*"):
            if self._faults[name]:
                return self._faults[name].popleft()
        return None


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.site.requests[path] += 1
        file = self.site.folder / path
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        (self.site.fault(path) or whole)(self, data)

    def begin(self, length: int, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Not on the terminal."""


def whole(handler: _Handler, data: bytes) -> None:
    handler.begin(len(data))
    handler.wfile.write(data)


def status(number: int) -> Fault:
    """An answer with this status."""
    return lambda handler, data: handler.send_error(number)


def redirect(url: str) -> Fault:
    """The file is at another place."""

    def answer(handler: _Handler, data: bytes) -> None:
        handler.send_response(302)
        handler.send_header("Location", url)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def behind_password(user: str, password: str) -> Fault:
    """Only who gives it gets the file."""
    right = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    return lambda handler, data: (whole if handler.headers["Authorization"] == right else status(401))(handler, data)


def cut(handler: _Handler, data: bytes) -> None:
    """Closes the connection in the middle of a body whose length it has given."""
    handler.begin(len(data))
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def short(handler: _Handler, data: bytes) -> None:
    """Half of the file, as if that were all."""
    whole(handler, data[: len(data) // 2])


def changed(handler: _Handler, data: bytes) -> None:
    """As many bytes, one of which is another."""
    whole(handler, data[:-1] + bytes([data[-1] ^ 1]))


def endless(handler: _Handler, data: bytes) -> None:
    """No length, and no end, until nobody reads any more."""
    handler.send_response(200)
    handler.end_headers()
    with _gone():
        while True:
            handler.wfile.write(bytes(1 << 16))


def stalled(seconds: float) -> Fault:
    """Half of the body, and the rest after this time."""

    def answer(handler: _Handler, data: bytes) -> None:
        handler.begin(len(data))
        with _gone():
            handler.wfile.write(data[: len(data) // 2])
            time.sleep(seconds)
            handler.wfile.write(data[len(data) // 2 :])

    return answer


def trickled(pause_s: float) -> Fault:
    """A byte after each pause: never silent, never done."""

    def answer(handler: _Handler, data: bytes) -> None:
        handler.begin(len(data))
        with _gone():
            for at in range(len(data)):
                handler.wfile.write(data[at : at + 1])
                time.sleep(pause_s)

    return answer


@contextmanager
def _gone() -> Iterator[None]:
    with suppress(BrokenPipeError, ConnectionResetError):
        yield


@contextmanager
def serving(folder: Path) -> Iterator[Site]:
    """Serves ``folder`` at a free port of 127.0.0.1."""
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        site = Site(folder, f"http://127.0.0.1:{server.server_address[1]}")
        handler.site = site  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield site
        finally:
            server.shutdown()
