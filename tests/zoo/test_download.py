"""Downloads from servers that lie, stall, lead elsewhere or die, and by several processes at once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from metazo import zoo
from metazo.errors import UserError
from metazo.zoo import download
from tests.zoo.conftest import make_tuner

DATA = make_tuner().to_bytes()
DIGEST = sha256(DATA).hexdigest()
REDIRECTS = {
    "/to-a-file": "file:///etc/passwd",
    "/to-ftp": "ftp://127.0.0.1/x",
    "/to-data": "data:text/plain,x",
    "/to-http": "http://192.0.2.1/x",
    "/round": "/round",
}


class Server(BaseHTTPRequestHandler):
    """Answers by path, each in a way of its own."""

    sent: int

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path in REDIRECTS:
            self.send_response(302)
            self.send_header("Location", REDIRECTS[path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path == "/slow-headers":
            self.wfile.write(b"HTTP/1.0 200 OK\r\n")
            self.drip(b"X: " + b"x" * 10_000, 0.1)
            return
        self.send_response(200)
        if path == "/endless-chunks":
            self.send_header("Transfer-Encoding", "chunked")
        length = {"/understated": len(DATA) - 1, "/overstated": len(DATA) + 5, "/negative": -1, "/word": "many"}
        self.send_header("Content-Length", str(length.get(path, len(DATA))))
        self.end_headers()
        if path == "/endless":
            self.flood(DATA)
        elif path == "/endless-chunks":
            self.flood(b"%x\r\n" % len(DATA) + DATA + b"\r\n")
        elif path == "/slow":
            self.drip(DATA, 0.2)
        elif path == "/dies":
            self.wfile.write(DATA[:700])
            self.connection.close()
        else:
            self.wfile.write(DATA)

    def drip(self, data: bytes, seconds: float) -> None:
        for start in range(len(data)):
            self.wfile.write(data[start : start + 1])
            time.sleep(seconds)

    def flood(self, piece: bytes) -> None:
        """Send for ever; the server keeps count."""
        while True:
            self.wfile.write(piece)
            self.server.sent += len(piece)  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    sent = 0

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what is tested here."""


@pytest.fixture
def server() -> Iterator[QuietServer]:
    server = QuietServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def address(server: QuietServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def files(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*") if path.is_file() and "lock" not in path.name)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("to-a-file", "answers 302"),
        ("to-ftp", "is not an https address"),
        ("to-data", "answers 302"),
        ("to-http", "is not an https address"),
        ("round", "answers 302"),
        ("understated", "is not a tuner that can be used"),
        ("overstated", "ended after"),
        ("negative", "does not announce its size"),
        ("word", "does not announce its size"),
        ("dies", "ended after 700|cannot be pulled"),
        ("endless-chunks", "ended after"),
    ],
)
def test_dishonest_servers_are_refused_and_leave_nothing(path: str, words: str, address: str, home: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        zoo.pull(f"{address}/{path}?token=hf_secret", report=lambda line: None)
    assert "secret" not in str(error.value) and "root:" not in str(error.value)
    assert not files(home)


def test_no_byte_beyond_what_was_announced_is_kept(address: str, server: QuietServer, home: Path) -> None:
    """The rest of an endless body stays with the server, but for what the sockets hold."""
    found = zoo.pull(f"{address}/endless", report=lambda line: None)
    assert found.path.read_bytes() == DATA
    time.sleep(0.3)
    assert server.sent < 2**24


@pytest.mark.parametrize(("path", "words"), [("slow", "is too slow: "), ("slow-headers", r"\(TimeoutError\)")])
def test_servers_that_drip_are_given_up(
    path: str, words: str, address: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SECONDS_TO_ANSWER", 1)
    began = time.monotonic()
    with pytest.raises(UserError, match=words):
        zoo.pull(f"{address}/{path}", report=lambda line: None)
    assert time.monotonic() - began < 10 and not files(home)


def test_a_redirect_from_outside_never_leads_to_this_machine() -> None:
    import urllib.request

    asked = urllib.request.Request("https://example.org/t")
    for target in ("http://127.0.0.1:1/x", "https://localhost/x", "http://[::1]/x"):
        with pytest.raises(UserError, match="this machine"):
            download._Redirects().redirect_request(asked, _Closed(), 302, "", {}, target)


class _Closed:
    def close(self) -> None:
        pass


def test_two_processes_pull_the_same_address_at_once(address: str, home: Path) -> None:
    program = "import sys; from metazo import zoo; print(zoo.pull(sys.argv[1], report=lambda line: None).path)"
    command = [sys.executable, "-c", program, f"{address}/t#sha256={DIGEST}"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0] and told[0] == told[1]
    assert Path(told[0]).read_bytes() == DATA and files(home) == ["card.md", "index.json", "tuner.safetensors"]
    assert {check.problem for check in zoo.verify() if check.where == "cache"} == {None}


def test_a_wrong_sha256_of_a_name_in_a_zoo_is_refused_too(tmp_path: Path) -> None:
    zoo.push(make_tuner(), tmp_path / "z")
    with pytest.raises(UserError, match=f"has sha256 .* and not the {'0' * 64} asked for"):
        zoo.pull(f"tiny/v1#sha256={'0' * 64}", tmp_path / "z")
