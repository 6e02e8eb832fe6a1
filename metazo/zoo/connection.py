"""One request over a connection with limits on time and bytes that hold whatever the server sends.

Python's http.client applies its timeout to each read and limits neither headers nor trailers as a whole, so a server
that sends one byte per minute, or endless trailers, blocks it for ever. Here every read of the socket asks `Limits`
first.
"""

from __future__ import annotations

import base64
import io
import socket
import ssl
import time
import urllib.request
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from metazo.errors import UserError
from metazo.zoo.address import judge_literal, resolve

HEADER_BYTES = 64 * 1024
"""Most bytes of an answer's status line and headers, and most bytes that chunks and trailers may add to a body."""


class Limits:
    """The time and the bytes that are left.

    seconds: from now to the end; rate: bytes per second; each `rate` bytes received give one more second (0: none);
    room: bytes that may be received. `restart` begins a new phase of the same connection.
    """

    def __init__(self, name: str, seconds: float):
        self.name = name
        self.restart(seconds, HEADER_BYTES)

    def restart(self, seconds: float, room: int, rate: float = 0) -> None:
        self.began, self.seconds, self.room, self.rate, self.received = time.monotonic(), seconds, room, rate, 0

    def spent(self) -> float:
        """Seconds that this phase has taken."""
        return time.monotonic() - self.began

    def left(self) -> float:
        """Seconds that are left. Raises TimeoutError if there are none."""
        more = self.received / self.rate if self.rate else 0.0
        left = self.seconds + more - self.spent()
        if left <= 0:
            raise TimeoutError
        return left

    def take(self, count: int) -> None:
        self.received += count
        if self.received > self.room:
            raise UserError(
                f"{self.name} is refused: the server sends more than the {self.room:,} bytes allowed "
                "(headers, chunks or trailers without end)"
            )


class _Reader(io.RawIOBase):
    def __init__(self, line: socket.socket, limits: Limits):
        self.line, self.limits = line, limits

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.line.settimeout(self.limits.left())
        count = self.line.recv_into(buffer)
        self.limits.take(count)
        return count


class _Socket:
    """The methods of a socket that http.client needs."""

    def __init__(self, line: socket.socket, limits: Limits):
        self.line, self.limits = line, limits

    def makefile(self, *mode: Any) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self.line, self.limits))

    def sendall(self, data: Any) -> None:
        self.line.settimeout(self.limits.left())
        self.line.sendall(data)

    def close(self) -> None:
        """Does nothing: http.client calls it before the answer is read. `Exchange.close` ends the connection."""


class Exchange:
    """A GET request and its answer, whose headers are read; `close` ends the connection. Raises OSError, UserError."""

    def __init__(self, parts: SplitResult, limits: Limits):
        self.line = line = _connected(parts, limits)
        try:
            host = str(parts.hostname)
            http = HTTPConnection(f"[{host}]" if ":" in host else host, parts.port or _port(parts))
            http.default_port = _port(parts)
            http.sock = _Socket(line, limits)  # type: ignore[assignment]
            target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{parts.query}" if parts.query else "")
            http.request("GET", target, headers={"User-Agent": "metazo", "Accept-Encoding": "identity"})
            self.response: HTTPResponse = http.getresponse()
        except BaseException:
            line.close()
            raise

    def close(self) -> None:
        self.response.close()
        self.line.close()


def _port(parts: SplitResult) -> int:
    return 443 if parts.scheme == "https" else 80


def _connected(parts: SplitResult, limits: Limits) -> socket.socket:
    """A connected socket, with TLS for https, to a checked address; through the user's proxy if there is one."""
    host, port = str(parts.hostname), parts.port or _port(parts)
    proxy = urllib.request.getproxies().get("https")
    if parts.scheme == "https" and proxy and not urllib.request.proxy_bypass(host):
        judge_literal(host)
        return _through(proxy, host, port, limits)
    failed: OSError | None = None
    for family, target in resolve(host, port, limits.left(), public=parts.scheme == "https"):
        line = socket.socket(family, socket.SOCK_STREAM)
        try:
            line.settimeout(limits.left())
            line.connect(target)
            if parts.scheme == "https":
                line.settimeout(limits.left())
                line = ssl.create_default_context().wrap_socket(line, server_hostname=host)
            return line
        except OSError as error:
            line.close()
            failed = error
    raise failed or OSError("the name has no address")


def _through(proxy: str, host: str, port: int, limits: Limits) -> socket.socket:
    """A tunnel through the proxy that the environment names (https_proxy), which resolves the host itself."""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    http = HTTPSConnection(str(parts.hostname), parts.port or 8080, timeout=limits.left())
    headers = {}
    if parts.username:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
    http.set_tunnel(host, port, headers)
    http.connect()
    return http.sock
