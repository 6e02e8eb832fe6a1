"""The Hub's token and secrets in addresses reach no message, no traceback and no file, whatever a server echoes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from metazo.errors import UserError, without_secrets
from metazo.runs.config import FinetuneConfig
from tests import warm
from tests.zoo.conftest import make_tuner
from tests.zoo.server import Handler, Server, serving

TOKEN = "hf_" + "Zq7" * 11
STORED = "hf_" + "Yx4" * 11
PASSWORD = "correct-horse"


class Echo(Handler):
    """A Hub that refuses everything and echoes each request in all parts of its response."""

    def answer(self) -> None:
        sent = str(self.headers.get("Authorization"))
        self.server.requests.append(sent)  # type: ignore[attr-defined]
        body = f'{{"error": "{sent} is not welcome at {self.path}"}}'.encode()
        echo = dict.fromkeys(("X_Error_Message", "X_Request_Id", "WWW_Authenticate"), f"your header was {sent}")
        self.reply(403, body, Content_Type="application/json", **echo)

    do_GET = do_HEAD = do_POST = do_PUT = answer


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server(Echo)) as server:
        yield server


PROGRAM = """
import sys, traceback
from metazo_cli.main import command_line
for line in sys.argv[1:]:
    try:
        command_line()(line.split(), standalone_mode=False)
        print("done:", line.split()[0])
    except BaseException:  # the whole chain, which the command line itself never prints
        traceback.print_exc()
"""


@pytest.mark.parametrize("where", ["environment", "stored"])
def test_a_token_is_sent_to_the_hub_and_to_nothing_else(where: str, tmp_path: Path, server: Server) -> None:
    address = server.address
    host = address.removeprefix("http://")
    make_tuner().save(tmp_path / "t.safetensors")
    home = tmp_path / "hub"
    home.mkdir()
    token = TOKEN if where == "environment" else STORED
    if where == "stored":
        (home / "token").write_text(STORED)
    lines = [
        "zoo pull org/tuner",
        f"zoo push {tmp_path}/t.safetensors --to hub:org/tuner",
        f"zoo pull http://me:{PASSWORD}@{host}/x?token={PASSWORD}",
        f"finetune --model org/tuner --task pico_cause --out {tmp_path}/a",
        f"finetune --model pico --task sst2 --out {tmp_path}/c",
        f"finetune --model pico --task pico_cause --tuner org/tuner --out {tmp_path}/d",
        f"finetune --model pico --task pico_cause --tuner http://me:{PASSWORD}@{host}/x?key={PASSWORD} --out {tmp_path}/e",
        f"zoo push {tmp_path}/t.safetensors --to {tmp_path}/z",
    ]
    known = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
             "HF_HOME": str(home), "HF_TOKEN": TOKEN if where == "environment" else ""}  # fmt: skip
    done = warm.run("-c", PROGRAM, *lines, environment=known, cwd=tmp_path)
    assert done.stdout.count("done:") == 1, done.stdout + done.stderr
    assert done.stderr.count("metazo.errors.UserError") == len(lines) - 1, done.stderr
    assert f"Bearer {token}" in server.requests  # it was sent, and echoed
    written = "".join(
        path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file() and path != home / "token"
    )
    for text in (done.stdout, done.stderr, written):
        assert token not in text and PASSWORD not in text


def test_messages_are_cleaned_whatever_they_are_made_of() -> None:
    address = f"https://me:{PASSWORD}@example.org/t?access_token={PASSWORD}&revision=1"
    message = str(UserError(f"no {address}; Authorization: Bearer abc.def said; {TOKEN}"))
    assert message == "no https://***@example.org/t?***&revision=1; Authorization: Bearer *** said; ***"
    assert (
        without_secrets("hf_hub_download of https://example.org/a@b?c=d")
        == "hf_hub_download of https://example.org/a@b?c=d"
    )


def test_an_address_with_a_secret_is_no_setting_of_a_run(tmp_path: Path) -> None:
    for address in (
        f"https://me:{PASSWORD}@example.org/t",
        f"https://example.org/t?token={PASSWORD}#sha256={'0' * 64}",
    ):
        with pytest.raises(UserError, match=r"`tuner` https://example\.org/t has a user, password or query") as error:
            FinetuneConfig("pico", "pico_cause", tmp_path / "x", tuner=address)
        assert PASSWORD not in str(error.value)
    FinetuneConfig("pico", "pico_cause", tmp_path / "x", tuner=f"https://example.org/t#sha256={'0' * 64}")
