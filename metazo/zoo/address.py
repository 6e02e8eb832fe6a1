"""Which addresses a download may go to: judged after the name was resolved, on every hop.

A name is resolved once, the addresses found are judged, and the connection goes to one that was judged. So a name that
resolves to something else a moment later (DNS rebinding) gains nothing. `socket.getaddrinfo` also reads the old forms
of IPv4 (127.1, 2130706433, 0x7f.1), which are judged as the addresses they are.
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
"""Networks that are not public and may be downloaded from all the same, also over http. Empty; tests name theirs."""
_EMBEDDED = [ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96")]
"""IPv6 networks whose last 32 bits are an IPv4 address: NAT64, and the old IPv4-compatible form."""
_IP = ipaddress.IPv4Address | ipaddress.IPv6Address
Targets = list[tuple[int, tuple[Any, ...]]]
"""Address family and socket address, in the order to be tried."""


def split(address: str) -> SplitResult:
    """The parts of an https address; http goes to ALLOWED networks alone. Raises UserError for any other text.

    Refused: other schemes, a user name or password (a stranger would get them), control characters, no host.
    """
    name = shown_address(address)
    try:
        parts = urlsplit(address)
        good = bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an address, a port that is no number
        parts, good = urlsplit(""), False
    schemes = ("https", "http") if ALLOWED else ("https",)
    if not good or parts.scheme not in schemes or not address.isprintable() or " " in address:
        raise UserError(f"{name} is not an https address; nothing is pulled over an open line")
    if "@" in parts.netloc:
        raise UserError(f"{name} was given with a user name or password; download it by hand and pull the file")
    return parts


def resolve(host: str, port: int, seconds: float, public: bool = True) -> Targets:
    """The socket addresses of a host, all of them judged (public=False: ALLOWED alone will do).

    Raises UserError, OSError, or TimeoutError after `seconds`.
    """
    outcome: list[Any] = []

    def ask() -> None:
        try:
            outcome.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # a server of names may never answer
    thread.start()
    thread.join(max(0.0, seconds))
    if not outcome:
        raise TimeoutError
    if isinstance(outcome[0], Exception):
        raise OSError("the name cannot be resolved") from None
    return judged([(family, target) for family, _, _, _, target in outcome[0]], host, public)


def judged(found: Targets, host: str, public: bool = True) -> Targets:
    """What a host was resolved to, if all of it is in ALLOWED or (public=True) public; else UserError."""
    for _, target in found:
        ip = ipaddress.ip_address(str(target[0]).partition("%")[0])
        if not _allowed(ip) and not (public and _is_public(ip)):
            raise UserError(
                f"{host[:200]} leads to {ip}, which is no address of the public internet; it is refused. Download it "
                "by hand and pull the file"
            )
    return found


def judge_literal(host: str) -> None:
    """UserError if `host` is an address, and one that `judged` refuses. Names pass: a proxy resolves them."""
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
    """The addresses that an IPv6 address stands for."""
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    found: list[_IP | None] = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if any(ip in network for network in _EMBEDDED):
        found.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    if ip.is_site_local:
        found.append(ipaddress.IPv6Address("fc00::"))  # the private addresses of before RFC 3879
    return [part for part in found if part is not None]
