"""Decides to which addresses a download may connect, after the name is resolved and again on every redirect.

A name is resolved once, its addresses are checked, and the connection goes to a checked address. A name that resolves to
another address a moment later (DNS rebinding) therefore gains nothing. `socket.getaddrinfo` also reads the old forms of
IPv4 (127.1, 2130706433, 0x7f.1), which are checked as the addresses that they mean.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from typing import Any
from urllib.parse import SplitResult, urlsplit

from metazo.errors import UserError
from metazo.io.redact import shown_address

ALLOWED: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
"""Networks that are not public but from which downloads are allowed, also over http. Empty; tests add their own."""
_EMBEDDED = [ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96")]
"""IPv6 networks whose last 32 bits are an IPv4 address: NAT64, and the old IPv4-compatible form."""
_IP = ipaddress.IPv4Address | ipaddress.IPv6Address
Targets = list[tuple[int, tuple[Any, ...]]]
"""Address family and socket address, in the order in which they are tried."""


def split(address: str) -> SplitResult:
    """The parts of an https address; http goes to ALLOWED networks alone. Raises UserError for any other text.

    It refuses other schemes, a user name or password (a stranger would get them), control characters, and a missing host.
    """
    name = shown_address(address)
    try:
        parts = urlsplit(address)
        good = bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an address, or a port that is not a number
        parts, good = urlsplit(""), False
    schemes = ("https", "http") if ALLOWED else ("https",)
    if not good or parts.scheme not in schemes or not address.isprintable() or " " in address:
        raise UserError(f"{name} is not an https address; metazo downloads over https only")
    if "@" in parts.netloc:
        raise UserError(f"{name} was given with a user name or password; download it by hand and pull the file")
    return parts


def resolve(host: str, port: int, seconds: float, public: bool = True) -> Targets:
    """The socket addresses of a host, all of them checked (public=False: only those in ALLOWED are accepted).

    Raises UserError, OSError, or TimeoutError after `seconds`.
    """
    outcome: list[Any] = []

    def ask() -> None:
        try:
            outcome.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # a name server may never answer
    thread.start()
    thread.join(max(0.0, seconds))
    if not outcome:
        raise TimeoutError
    if isinstance(outcome[0], Exception):
        raise OSError("the name cannot be resolved") from None
    return judged([(family, target) for family, _, _, _, target in outcome[0]], host, public)


def judged(found: Targets, host: str, public: bool = True) -> Targets:
    """The addresses of a host if all are in ALLOWED or (public=True) public; otherwise raises UserError."""
    for _, target in found:
        ip = ipaddress.ip_address(str(target[0]).partition("%")[0])
        if not _allowed(ip) and not (public and _is_public(ip)):
            raise UserError(
                f"{host[:200]} leads to {ip}, which is not an address of the public internet; it is refused. Download it "
                "by hand and pull the file"
            )
    return found


def judge_literal(host: str) -> None:
    """Raises UserError if `host` is an address that `judged` refuses. Names pass, because a proxy resolves them."""
    if host.rstrip(".").lower().endswith("localhost"):
        raise UserError(f"{host[:200]} is an address of this machine; it is refused")
    try:
        found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return
    judged([(family, target) for family, _, _, _, target in found], host)


def _allowed(ip: _IP) -> bool:
    return any(ip in network for network in ALLOWED if network.version == ip.version)


def _is_public(ip: _IP) -> bool:
    return all(part.is_global and not part.is_multicast for part in (ip, *_within(ip)))


def _within(ip: _IP) -> list[_IP]:
    """The addresses that an IPv6 address represents."""
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    found: list[_IP | None] = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if any(ip in network for network in _EMBEDDED):
        found.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    if ip.is_site_local:
        found.append(ipaddress.IPv6Address("fc00::"))  # the private addresses that RFC 3879 deprecated
    return [part for part in found if part is not None]
