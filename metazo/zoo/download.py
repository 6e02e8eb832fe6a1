"""Download a file over https, with limits on its size, time and origin.

The data stay in memory until they are checked; nothing is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from urllib.parse import urljoin

from metazo.errors import UserError
from metazo.io.redact import shown_address
from metazo.io.terminal import print_line
from metazo.tuner.limits import MAX_BYTES
from metazo.zoo.address import split
from metazo.zoo.connection import HEADER_BYTES, Exchange, Limits

SECONDS_TO_ANSWER = 30
"""Most seconds from the request to the end of the answer's headers, including redirects."""
LEAST_RATE = 10_000
"""Bytes per second, on average, below which a download is given up after SECONDS_TO_ANSWER more."""
REDIRECTS = 10


def download(address: str, size: int | None = None, report: Callable[[str], None] = print_line) -> bytes:
    """The file at an https address, of `size` bytes if that is known.

    The size is announced first; more bytes than announced, or than MAX_BYTES, are not read. Raises UserError if the
    address or one that it leads to is not public (metazo/zoo/address.py), if the server sends anything but the announced
    file, and if it is too slow.
    """
    name = shown_address(address)
    limits = Limits(name, SECONDS_TO_ANSWER)
    try:
        exchange = _answered(address, limits)
        try:
            announced = _announced(exchange.response, name, size)
            report(f"pulling {name} ({announced:,} bytes)")
            limits.restart(SECONDS_TO_ANSWER, 2 * announced + HEADER_BYTES, LEAST_RATE)
            data = _body(exchange.response, announced)
        finally:
            exchange.close()
    except TimeoutError:
        raise UserError(
            f"{name} is too slow: {limits.received:,} bytes in {limits.spent():.0f} s; pull it again"
        ) from None
    except (OSError, HTTPException, ValueError) as error:  # from None: the errors' texts may hold the whole address
        raise UserError(f"{name} cannot be pulled ({type(error).__name__}); check the address and network") from None
    if len(data) != announced:
        raise UserError(f"{name} ended after {len(data):,} of {announced:,} bytes; pull it again")
    return data


def _answered(address: str, limits: Limits) -> Exchange:
    """The answer of the last server to which the address leads, after redirects."""
    for _ in range(REDIRECTS):
        limits.restart(limits.left(), HEADER_BYTES)
        exchange = Exchange(split(address), limits)
        status, location = exchange.response.status, exchange.response.headers.get("Location")
        if status == 200:
            return exchange
        exchange.close()
        if status not in (301, 302, 303, 307, 308) or not location:
            raise UserError(f"{shown_address(address)} cannot be pulled: the server answers {status}")
        address = urljoin(address, location)
    raise UserError(f"{limits.name} leads from one address to the next, {REDIRECTS} times; it is refused")


def _announced(response: HTTPResponse, name: str, size: int | None) -> int:
    length = response.headers.get("Content-Length")
    announced = int(length) if length and length.isascii() and length.isdigit() and len(length) < 20 else size
    if announced is None:
        raise UserError(f"{name} does not announce its size; download it by hand and pull the file")
    if announced > MAX_BYTES or (size is not None and announced != size):
        limit = f"{size:,} in the zoo index" if size is not None else f"{MAX_BYTES:,} allowed"
        raise UserError(f"{name} announces {announced:,} bytes, not the {limit}; it is refused")
    return announced


def _body(response: HTTPResponse, announced: int) -> bytes:
    """At most one byte more than announced."""
    data = bytearray()
    while len(data) <= announced and (chunk := response.read1(min(65536, announced + 1 - len(data)))):
        data += chunk
    return bytes(data)
