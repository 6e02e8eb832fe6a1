"""Pulling over the network: from real local servers, honest and dishonest."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from metazo import zoo
from metazo.errors import UserError
from metazo.io.redact import shown_address
from metazo.tuner.file import Tuner
from metazo.zoo.index import Entry, write_index
from tests import warm
from tests.zoo.conftest import make_tuner
from tests.zoo.server import Handler, Server, serving

DATA = make_tuner().to_bytes()
DIGEST = sha256(DATA).hexdigest()
COMMIT = "a" * 40
HUB_FILE = "/org/tuner/resolve/"


class Answering(Handler):
    """Answers by path; /org/tuner/... as the Hub does."""

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")  # type: ignore[attr-defined]
        path = self.path.split("?")[0]
        if path.startswith(HUB_FILE) and path.endswith("/tuner.safetensors"):
            revision = path.removeprefix(HUB_FILE).split("/")[0]
            known = revision in ("v1", COMMIT)
            if known:
                self.reply(200, DATA, ETag=f'"{DIGEST}"', X_Repo_Commit=COMMIT)
            else:
                self.reply(404, X_Error_Code="RevisionNotFound")
        elif path == "/api/models/org/tuner/tree/main":
            self.reply(200, b"[]", Content_Type="application/json")
        elif path == "/elsewhere":
            self.reply(302, Location="https://192.0.2.1/tuner.safetensors")
        elif path == "/huge":
            self.send_response(200)
            self.send_header("Content-Length", str(2**40))
            self.end_headers()
        elif path == "/unannounced":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(DATA)
        elif path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()
            self.wfile.write(DATA[:-7])
        elif path == "/slow":
            self.send_response(200)
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()
            self.wfile.write(DATA[:1000])
            self.wfile.flush()
            time.sleep(20)
        elif path == "/tuner.safetensors":
            self.reply(200, DATA)
        else:
            self.reply(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """The requests of an upload of small files to the Hub; the commit is kept."""
        body = self.given()
        if self.path.startswith("/api/models/org/tuner/commit/"):
            self.server.requests.append(body.decode())  # type: ignore[attr-defined]
        hub = self.server.address  # type: ignore[attr-defined]
        answers = {
            "/api/repos/create": {"url": f"{hub}/org/tuner"},
            "/api/validate-yaml": {},
            "/api/models/org/tuner/preupload/main": {
                "files": [
                    {"path": name, "uploadMode": "regular", "shouldIgnore": False}
                    for name in ("tuner.safetensors", "README.md")
                ]
            },
            "/api/models/org/tuner/commit/main": {"commitUrl": f"{hub}/org/tuner/commit/1", "commitOid": COMMIT},
        }
        content = json.dumps(answers.get(self.path)).encode()
        self.reply(200 if self.path in answers else 404, content, Content_Type="application/json")


@pytest.fixture
def server(loopback: None) -> Iterator[Server]:
    with serving(Server(Answering)) as server:
        yield server


@pytest.fixture
def address(server: Server) -> str:
    return server.address


def kept(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file() and "lock" not in path.name] if home.exists() else []


def test_pull_announces_checks_and_keeps(address: str, home: Path, server: Server) -> None:
    lines: list[str] = []
    found = zoo.pull(f"{address}/tuner.safetensors?token=secret#sha256={DIGEST}", report=lines.append)
    assert found.path.read_bytes() == DATA
    assert lines == [f"pulling {address}/tuner.safetensors ({len(DATA):,} bytes)"]
    zoo.pull(f"{address}/tuner.safetensors#sha256={DIGEST}", report=lines.append)
    assert len(lines) == len(server.requests) == 1  # the second came from the cache
    found.path.write_bytes(DATA[:-1])
    assert zoo.pull(f"{address}/tuner.safetensors#sha256={DIGEST}").path.read_bytes() == DATA


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (f"tuner.safetensors#sha256={'0' * 64}", f"has sha256 {DIGEST} and not the {'0' * 64}"),
        ("tuner.safetensors#sha256=12", "not 64 hexadecimal digits"),
        ("huge", "announces 1,099,511,627,776 bytes"),
        ("unannounced", "does not announce its size"),
        ("short", "ended after"),
        ("missing", "answers 404"),
        ("elsewhere", "leads to 192.0.2.1, which is not an address of the public internet"),
    ],
)
def test_what_is_not_as_announced_is_refused(path: str, words: str, address: str, home: Path) -> None:
    with pytest.raises(UserError, match=words):
        zoo.pull(f"{address}/{path}")
    assert not kept(home)


def test_no_open_lines_and_no_secrets_in_messages(address: str) -> None:
    with pytest.raises(UserError, match=r"^http://example\.org/t was given with a user name or password"):
        zoo.pull("http://user:secret@example.org/t?token=secret")
    with pytest.raises(UserError, match=r"8\.8\.8\.8 leads to 8\.8\.8\.8, which is not an address"):
        zoo.pull("http://8.8.8.8/t?token=secret")
    with pytest.raises(UserError) as error:
        zoo.pull(address.replace("127.0.0.1", "user:secret@127.0.0.1") + "/missing?token=secret")
    assert "secret" not in str(error.value)
    assert shown_address("https://u:p@host:1/x?y#z") == "https://host:1/x"


def test_index_with_an_address_is_checked_against_its_size_and_sha(address: str, tmp_path: Path) -> None:
    def index(path: str, digest: str = DIGEST, size: int = len(DATA)) -> None:
        info = make_tuner().info
        entry = Entry("tiny/v1", "tiny", digest, size, info.fingerprint, 2, None, f"{address}/{path}")
        write_index(tmp_path / "z", [entry])

    index("tuner.safetensors", digest="0" * 64)
    with pytest.raises(UserError, match="the zoo index says 0000"):
        zoo.pull("tiny/v1", tmp_path / "z")
    index("tuner.safetensors", size=len(DATA) - 1)
    with pytest.raises(UserError, match=r"not the .* in the zoo index"):
        zoo.pull("tiny/v1", tmp_path / "z")
    index("tuner.safetensors")
    assert zoo.pull("tiny/v1", tmp_path / "z").path.read_bytes() == DATA


def test_killed_pull_leaves_no_half_file(address: str, home: Path, server: Server) -> None:
    program = (
        "import functools, ipaddress, sys; from metazo import zoo; from metazo.zoo import address;"
        "address.ALLOWED.append(ipaddress.ip_network('127.0.0.1/32'));"
        "zoo.pull(sys.argv[1], report=functools.partial(print, flush=True))"
    )
    process = warm.Process("-c", program, f"{address}/slow")
    until = time.monotonic() + 60
    while not (shown := process.shown()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    assert shown.startswith("pulling")
    time.sleep(0.2)
    assert process.poll() is None  # it is waiting for the rest
    process.kill()
    process.wait(30)
    assert server.requests and not kept(home)


def run(address: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with the Hub at `address`."""
    program = (
        "import sys\nfrom metazo.errors import UserError\nfrom metazo_cli.zoo import app\n"
        "try:\n    app(standalone_mode=False)\nexcept UserError as e:\n    print(e, file=sys.stderr); sys.exit(2)"
    )
    known = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    return warm.run("-c", program, *arguments, environment=known | environment)


def test_hub_pull_with_revision(address: str, home: Path) -> None:
    done = run(address, "pull", "org/tuner@v1")
    assert done.returncode == 0, done.stderr
    assert f"pulling org/tuner@v1 ({len(DATA):,} bytes)" in done.stderr
    assert [path.read_bytes() for path in kept(home) if path.suffix == ".safetensors"] == [DATA]
    missing = run(address, "pull", "org/tuner@v2")
    assert (
        missing.returncode == 2
        and "org/tuner@v2 cannot be pulled: the repository has no such revision" in missing.stderr
    )
    offline = run("http://127.0.0.1:9", "pull", "org/tuner@v1", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    for process in (done, missing):
        assert "hf_secret" not in process.stdout + process.stderr


def test_hub_push_without_the_hub() -> None:
    with pytest.raises(UserError, match="org/tuner cannot be pushed to: HF_HUB_OFFLINE is set"):
        zoo.push(make_tuner(), "hub:org/tuner")


def test_hub_push(address: str, tmp_path: Path, server: Server) -> None:
    make_tuner("org/base").save(tmp_path / "tuner.safetensors")
    done = run(address, "push", str(tmp_path), "--to", "hub:org/tuner", "--licence", "Apache-2.0", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["published"] == f"{address}/org/tuner/commit/1"
    lines = [json.loads(line) for line in server.requests[-1].splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    tuner = Tuner.from_bytes(files["tuner.safetensors"], "pushed")
    assert tuner.info.licence == "Apache-2.0"
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: metazo\nbase_model: 'org/base'\nlicense: 'apache-2.0'\n")
    assert sha256(files["tuner.safetensors"]).hexdigest() in card
    assert "hf_secret" not in card + done.stdout + done.stderr
