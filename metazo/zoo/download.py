"""Download a file over https: no more than was announced, no longer than is reasonable, from nowhere else.

What is downloaded stays in memory until it is checked; nothing is written here.
"""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from metazo.errors import UserError
from metazo.io.redact import shown_address
from metazo.tuner.file import MAX_BYTES

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
SECONDS_TO_ANSWER = 30
"""From the request to the end of the answer's headers, redirects included."""
LEAST_RATE = 10_000
"""Bytes a second, on average, below which a download is given up after SECONDS_TO_ANSWER more."""


def download(address: str, size: int | None = None, report: Callable[[str], None] = print) -> bytes:
    """The file at an https address (http only on this machine), of `size` bytes if that is known.

    The size is announced first; more bytes than announced, or than MAX_BYTES, are not read. Raises UserError.
    """
    name = shown_address(address)
    try:
        check_scheme(address)
        with _opened(address) as response:
            announced = _announced(response, name, size)
            report(f"pulling {name} ({announced:,} bytes)")
            data = _body(response, announced, name)
    except urllib.error.HTTPError as error:
        raise UserError(f"{name} cannot be pulled: the server answers {error.code}") from None
    except (OSError, HTTPException, ValueError) as error:  # from None: what they say may hold the whole address
        reason = type(getattr(error, "reason", error)).__name__
        raise UserError(f"{name} cannot be pulled ({reason}); check the address and network") from None
    if len(data) != announced:
        raise UserError(f"{name} ended after {len(data):,} of {announced:,} bytes; pull it again")
    return data


def _opened(address: str) -> HTTPResponse:
    """The answer to a request, its headers read. In a thread, as a server may send them a byte a minute."""
    outcome: list[Any] = []

    def request() -> None:
        asked = urllib.request.Request(address, headers={"User-Agent": "metazo", "Accept-Encoding": "identity"})
        try:
            outcome.append(urllib.request.build_opener(_Redirects()).open(asked, timeout=SECONDS_TO_ANSWER))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_ANSWER)
    if not outcome:
        raise TimeoutError
    if isinstance(outcome[0], urllib.error.HTTPError):
        outcome[0].close()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _announced(response: HTTPResponse, name: str, size: int | None) -> int:
    length = response.headers.get("Content-Length")
    announced = int(length) if length and length.isascii() and length.isdigit() and len(length) < 20 else size
    if announced is None:
        raise UserError(f"{name} does not announce its size; download it by hand and pull the file")
    if announced > MAX_BYTES or (size is not None and announced != size):
        limit = f"{size:,} in the zoo index" if size is not None else f"{MAX_BYTES:,} allowed"
        raise UserError(f"{name} announces {announced:,} bytes, not the {limit}; it is refused")
    return announced


def _body(response: HTTPResponse, announced: int, name: str) -> bytes:
    """At most one byte more than announced, piece by piece, so that the clock is looked at."""
    began, data = time.monotonic(), bytearray()
    while len(data) <= announced:
        piece = response.read1(min(65536, announced + 1 - len(data)))
        if not piece:
            break
        data += piece
        spent = time.monotonic() - began
        if spent > SECONDS_TO_ANSWER + len(data) / LEAST_RATE:
            raise UserError(f"{name} is too slow: {len(data):,} of {announced:,} bytes in {spent:.0f} s; pull it again")
    return bytes(data)


def check_scheme(address: str) -> None:
    """UserError unless this is an https address, or an http one on this machine."""
    try:
        parts = urlsplit(address)
        good = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)
    except ValueError:  # brackets that hold no address
        good = False
    if not good:
        raise UserError(f"{shown_address(address)} is not an https address; nothing is pulled over an open line")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but only to where a pull may go; and from outside never to this machine."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        fp.close()
        check_scheme(newurl)
        if urlsplit(newurl).hostname in LOOPBACK and urlsplit(req.full_url).hostname not in LOOPBACK:
            raise UserError(f"{shown_address(req.full_url)} leads to an address on this machine; it is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
