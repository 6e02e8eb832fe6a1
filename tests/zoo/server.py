"""What the local HTTP servers of these tests share: their handlers' requests and answers, and the time that they run."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "b" * 40


class Handler(BaseHTTPRequestHandler):
    def given(self) -> bytes:
        """The body of the request, whose length is stated or which comes in chunks."""
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def reply(self, code: int, content: bytes = b"", **headers: str) -> None:
        """Answer with this content, without it to HEAD; a header's name has _ for -."""
        self.send_response(code)
        for name, value in (headers | {"Content_Length": str(len(content))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None: ...


class Hub(Handler):
    """Repositories in memory: create, preupload, commit, HEAD and GET of files, and a repository's list of files."""

    files: dict[str, dict[str, bytes]]
    refuse = 0
    cut = False
    commit = COMMIT

    def do_POST(self) -> None:
        body = self.given()
        parts = self.path.split("?")[0].strip("/").split("/")
        base = self.server.address  # type: ignore[attr-defined]
        if self.refuse:
            self.answer(self.refuse, {"error": "forbidden"})
        elif parts[:3] == ["api", "repos", "create"]:
            name = json.loads(body)
            repository = f"{name['organization']}/{name['name']}"
            self.files.setdefault(repository, {})
            self.answer(200, {"url": f"{base}/{repository}"})
        elif parts[-2:] == ["preupload", "main"]:
            names = [each["path"] for each in json.loads(body)["files"]]
            self.answer(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif parts[-2:] == ["commit", "main"]:
            repository = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.files[repository][line["value"]["path"]]
            self.answer(200, {"commitUrl": f"{base}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer(200, {})

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        content = self.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
        if parts[0] == "api" and parts[4:5] == ["tree"]:
            there = self.files.get("/".join(parts[2:4]))
            if there is None:
                return self.reply(404, X_Error_Code="RepoNotFound")
            self.answer(200, [{"type": "file", "path": n, "size": len(d), "oid": COMMIT} for n, d in there.items()])
        elif parts[2:3] != ["resolve"] or content is None or parts[3] not in ("main", "v2", self.commit):
            self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit)
        else:
            if self.cut and self.command == "GET":
                content = content[:-7]
            self.reply(200, content, ETag=f'"{sha256(content).hexdigest()}"', X_Repo_Commit=self.commit)

    do_HEAD = do_GET

    def answer(self, code: int, value: object) -> None:
        self.reply(code, json.dumps(value).encode(), Content_Type="application/json")


class Server(ThreadingHTTPServer):
    """Attributes: requests, which handlers add to; address, that of the server."""

    daemon_threads, block_on_close = True, False

    def __init__(self, handler: type[Handler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.requests: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Let it serve for the length of the context."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
