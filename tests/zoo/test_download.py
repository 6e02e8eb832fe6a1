"""Downloads from servers that lie, stall, redirect or fail, and by several processes at once."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from metazo import zoo
from metazo.errors import UserError
from metazo.zoo import address as address_rules
from metazo.zoo import download
from tests import warm
from tests.zoo.conftest import make_tuner
from tests.zoo.server import Handler, Server, serving

DATA = make_tuner().to_bytes()
DIGEST = sha256(DATA).hexdigest()
REDIRECTS = {
    "/to-a-file": "file:///etc/passwd",
    "/to-ftp": "ftp://127.0.0.1/x",
    "/to-data": "data:text/plain,x",
    "/round": "/round",
    "/back": "/t",
    "/with-a-password": "http://me:hf_secret@127.0.0.1/x",
}
ELSEWHERE = (
    "127.1", "2130706433", "0x7f.1", "0177.0.0.2", "0.0.0.0", "0", "127.0.0.2", "[::1]", "[::ffff:127.0.0.2]",
    "[0:0:0:0:0:0:0:1]", "[::]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[fe80::1%25lo]", "[fec0::1]", "10.0.0.1",
    "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1",
    "[2002:7f00:1::]", "[fc00::1]", "[ff02::1]",
)  # fmt: skip
"""Addresses that are not public, in all their forms. 127.0.0.1 is the one that these tests may use."""


class Faulty(Handler):
    """A server whose fault depends on the path."""

    sent: int

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        to = f"https://{self.path.partition('?')[2]}/x" if path == "/to" else REDIRECTS.get(path)
        if to is not None:
            self.reply(302, Location=to)
            return
        if path == "/slow-headers":
            self.wfile.write(b"HTTP/1.0 200 OK\r\n")
            self.drip(b"X: " + b"x" * 10_000, 0.1)
            return
        if path == "/endless-headers":
            self.wfile.write(b"HTTP/1.0 200 OK\r\n")
            self.flood(b"X: " + b"x" * 10_000 + b"\r\n")
        if path == "/endless-continue":
            self.flood(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.protocol_version = "HTTP/1.1" if path.endswith(("chunks", "trailers")) else "HTTP/1.0"
        self.send_response(200)
        if path.endswith(("chunks", "trailers")):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            match path:
                case "/endless-chunks":
                    self.flood(b"%x\r\n" % len(DATA) + DATA + b"\r\n")
                case "/chunks":
                    self.wfile.write(b"%x\r\n" % len(DATA) + DATA + b"\r\n0\r\n\r\n")
                case "/byte-chunks":
                    self.flood(b"1\r\nx\r\n" * 1000)
                case "/padded-chunks":
                    self.flood(b"1;" + b"x" * 1000 + b"\r\nx\r\n")
                case "/endless-trailers":
                    self.wfile.write(b"%x\r\n" % len(DATA) + DATA + b"\r\n0\r\n")
                    self.flood(b"X: " + b"x" * 1000 + b"\r\n")
                case "/slow-trailers":
                    self.wfile.write(b"%x\r\n" % len(DATA) + DATA + b"\r\n0\r\n")
                    self.drip(b"X: " + b"x" * 10_000, 0.1)
            return
        length = {"/understated": len(DATA) - 1, "/overstated": len(DATA) + 5, "/negative": -1, "/word": "many"}
        self.send_header("Content-Length", str(length.get(path, len(DATA))))
        self.end_headers()
        if path == "/endless":
            self.flood(DATA)
        elif path == "/slow":
            self.drip(DATA, 0.2)
        elif path == "/dies":
            self.wfile.write(DATA[:700])
            self.connection.close()
        else:
            self.wfile.write(DATA)

    def do_CONNECT(self) -> None:
        self.server.connected.append(self.path)  # type: ignore[attr-defined]
        self.send_error(501)

    def drip(self, data: bytes, seconds: float) -> None:
        for start in range(len(data)):
            self.wfile.write(data[start : start + 1])
            time.sleep(seconds)

    def flood(self, piece: bytes) -> None:
        """Send without end; the server counts the bytes."""
        while True:
            self.wfile.write(piece)
            self.server.sent += len(piece)  # type: ignore[attr-defined]


class QuietServer(Server):
    sent = 0

    def __init__(self) -> None:
        super().__init__(Faulty)
        self.connected: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """The tests expect that the client hangs up."""


@pytest.fixture
def server(loopback: None) -> Iterator[QuietServer]:
    with serving(QuietServer()) as server:
        yield server


@pytest.fixture
def address(server: QuietServer) -> str:
    return server.address


def files(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*") if path.is_file() and "lock" not in path.name)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("to-a-file", "^file:///etc/passwd is not an https address"),
        ("to-ftp", "is not an https address"),
        ("to-data", "is not an https address"),
        ("with-a-password", "user name or password"),
        ("round", "from one address to the next, 10 times"),
        ("understated", "is not a tuner that can be used"),
        ("overstated", "ended after"),
        ("negative", "does not announce its size"),
        ("word", "does not announce its size"),
        ("dies", "ended after 700|cannot be pulled"),
        ("endless-headers", "sends more than the 65,536 bytes|cannot be pulled"),
        ("endless-continue", "sends more than the 65,536 bytes"),
    ],
)
def test_dishonest_servers_are_refused_and_leave_nothing(path: str, words: str, address: str, home: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        zoo.pull(f"{address}/{path}?token=hf_secret", report=lambda line: None)
    assert "secret" not in str(error.value) and "root:" not in str(error.value)
    assert not files(home)


def test_no_byte_beyond_what_was_announced_is_kept(address: str, server: QuietServer, home: Path) -> None:
    """The rest of an endless body is not read, except for the sockets' buffers."""
    found = zoo.pull(f"{address}/endless", report=lambda line: None)
    assert found.path.read_bytes() == DATA
    time.sleep(0.3)
    assert server.sent < 2**24


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("endless-chunks", "ended after"),
        ("byte-chunks", "sends more than"),
        ("padded-chunks", "sends more than"),
        ("endless-trailers", "sends more than"),
    ],
)
def test_chunks_and_trailers_without_end_are_refused(path: str, words: str, address: str, server: QuietServer) -> None:
    """The size is known from an index, so that the server need not announce it."""
    with pytest.raises(UserError, match=words):
        size = 100_000 if path == "byte-chunks" else len(DATA)
        download.download(f"{address}/{path}", size, lambda line: None)
    time.sleep(0.3)
    assert server.sent < 2**24
    assert download.download(f"{address}/chunks", len(DATA), lambda line: None) == DATA


@pytest.mark.parametrize("path", ["slow", "slow-headers", "slow-trailers"])
def test_servers_that_drip_are_given_up(path: str, address: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "SECONDS_TO_ANSWER", 0.5)
    began = time.monotonic()
    with pytest.raises(UserError, match="is too slow: "):
        download.download(f"{address}/{path}", len(DATA), lambda line: None)
    assert time.monotonic() - began < 10 and not files(home)


def test_a_redirect_is_followed_to_the_same_server(address: str, home: Path) -> None:
    assert zoo.pull(f"{address}/back", report=lambda line: None).path.read_bytes() == DATA


@pytest.mark.parametrize("host", ELSEWHERE)
def test_no_address_that_is_not_public_is_connected_to(host: str, address: str, server: QuietServer) -> None:
    """Neither as the given address nor as a redirect."""
    for asked in (f"https://{host}:{server.server_address[1]}/t", f"{address}/to?{host}"):
        refused = "which is not an address of the public internet|cannot be resolved|cannot be pulled"
        if host in ("127.1", "2130706433", "0x7f.1"):  # 127.0.0.1, which this test allows: TLS fails on a plain server
            refused = "cannot be pulled"
        with pytest.raises(UserError, match=refused):
            download.download(asked, len(DATA), lambda line: None)
    assert not [path for path in server.requests if not path.startswith("/to")]


def test_this_machine_is_refused_by_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tests' exception; a name is checked by the address to which it resolves."""
    for host in (*ELSEWHERE, "127.0.0.1", "localhost"):
        if "%" in host:  # a zone may be unknown to the resolver
            continue
        with pytest.raises(UserError, match="not an address of the public internet"):
            address_rules.resolve(host.strip("[]"), 443, 10)
    with pytest.raises(UserError, match="is not an https address"):
        download.download("http://127.0.0.1/x")


def test_the_address_that_was_judged_is_the_one_that_is_connected_to(
    address: str, server: QuietServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is resolved once, so that a second, forbidden address is never used."""
    asked, port = [], server.server_address[1]
    real = socket.getaddrinfo

    def rebinding(host: Any, *rest: Any, **more: Any) -> Any:
        if host != "rebind.example":
            return real(host, *rest, **more)
        asked.append(host)
        return real("127.0.0.1" if len(asked) == 1 else "127.0.0.2", *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert download.download(f"http://rebind.example:{port}/t", len(DATA), lambda line: None) == DATA
    assert asked == ["rebind.example"]
    with pytest.raises(UserError, match=r"rebind\.example leads to 127\.0\.0\.2"):
        download.download(f"http://rebind.example:{port}/t", len(DATA), lambda line: None)


def test_one_bad_address_among_good_ones_refuses_the_name() -> None:
    good, bad = (2, ("8.8.8.8", 443)), (2, ("10.0.0.1", 443))
    assert address_rules.judged([good], "a.example") == [good]
    with pytest.raises(UserError, match=r"a\.example leads to 10\.0\.0\.1"):
        address_rules.judged([good, bad], "a.example")


def test_a_password_reaches_neither_the_resolver_nor_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *rest, **more: asked.append(rest) or [])
    for source in ("https://me:hf_secret@example.org/t", "me:hf_secret@example.org/t", "https://me:hf_secret@[::1/t"):
        with pytest.raises(UserError) as error:
            zoo.pull(source, report=lambda line: None)
        assert "hf_secret" not in str(error.value)
    assert not asked


def test_a_proxy_is_asked_for_the_name_but_never_for_this_machine(
    server: QuietServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers CONNECT with 501, as it knows GET alone."""
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(UserError, match="cannot be pulled"):
        download.download("https://example.org/t", len(DATA), lambda line: None)
    assert server.connected == ["example.org:443"]
    for host in ("localhost", "127.0.0.2", "0x7f.2"):
        with pytest.raises(UserError, match="refused"):
            download.download(f"https://{host}/t", len(DATA), lambda line: None)
    assert len(server.connected) == 1


def test_two_processes_pull_the_same_address_at_once(address: str, home: Path) -> None:
    program = (
        "import ipaddress, sys; from metazo import zoo; from metazo.zoo import address; "
        "address.ALLOWED.append(ipaddress.ip_network('127.0.0.1/32')); "
        "print(zoo.pull(sys.argv[1], report=lambda line: None).path)"
    )
    running = [warm.Process("-c", program, f"{address}/t#sha256={DIGEST}") for _ in range(2)]
    told = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0] and told[0] == told[1]
    assert Path(told[0]).read_bytes() == DATA and files(home) == ["card.md", "index.json", "tuner.safetensors"]
    assert {check.problem for check in zoo.verify() if check.where == "cache"} == {None}


def test_a_wrong_sha256_of_a_name_in_a_zoo_is_refused_too(tmp_path: Path) -> None:
    zoo.push(make_tuner(), tmp_path / "z")
    with pytest.raises(UserError, match=f"has sha256 .* and not the {'0' * 64} asked for"):
        zoo.pull(f"tiny/v1#sha256={'0' * 64}", tmp_path / "z")
