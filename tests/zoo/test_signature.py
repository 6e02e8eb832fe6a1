"""Signed indexes: with real keys of minisign, made here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metazo import zoo
from metazo.errors import UserError
from metazo.zoo.signature import check_signature, signer
from tests import warm
from tests.zoo.conftest import make_tuner
from tests.zoo.test_cli import run

minisign: Any = pytest.importorskip("minisign", reason="py-minisign is not installed: pip install 'metazo[sign]'")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """Files with a secret key without a password and its public key."""
    return write(tmp_path, "mine")


def write(folder: Path, name: str) -> tuple[Path, Path]:
    pair = minisign.KeyPair.generate()
    secret, public = folder / f"{name}.key", folder / f"{name}.pub"
    secret.write_bytes(bytes(pair.secret_key))
    public.write_bytes(bytes(pair.public_key))
    return secret, public


def signed(folder: Path, secret: Path, **of: Any) -> str:
    return zoo.push(make_tuner(**of), folder, sign=signer(str(secret), lambda: ""))


def test_a_signed_zoo_is_pulled_and_verified(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    secret, public = keys
    name = signed(tmp_path / "z", secret)
    assert (tmp_path / "z" / "index.json.minisig").read_text().splitlines()[2] == "trusted comment: file:index.json"
    for key in (str(public), public.read_text().splitlines()[1]):  # the file, or its text as for minisign -P
        assert zoo.pull(name, tmp_path / "z", key=key).path.is_file()
        assert [check.problem for check in zoo.verify(tmp_path / "z", key)] == [None]
    assert zoo.pull("tiny", tmp_path / "z").path.is_file()  # without a key nothing is asked


def test_what_the_key_did_not_sign_is_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    secret, public = keys
    folder, other = tmp_path / "z", write(tmp_path, "other")[1]
    name = signed(folder, secret)

    def refused(words: str, key: Path = public) -> None:
        for call in (lambda: zoo.pull(name, folder, key=str(key)), lambda: zoo.verify(folder, str(key))):
            with pytest.raises(UserError, match=words):
                call()

    refused("its signature is not by the key given", other)
    index = folder / "index.json"
    sound = index.read_text()
    content = json.loads(sound)
    content["tuners"][0]["sha256"] = "0" * 64
    index.write_text(json.dumps(content))
    refused("its signature is not by the key given")
    index.write_text(sound)
    (folder / name / "tuner.safetensors").write_bytes(make_tuner(seed=3).to_bytes())
    with pytest.raises(UserError, match="has sha256"):
        zoo.pull(name, folder, key=str(public))
    (folder / "index.json.minisig").write_bytes(b"\xff" * 5000)
    refused("is refused")
    (folder / "index.json.minisig").unlink()
    refused("is not signed")
    index.unlink()
    refused("is not a file")


def test_only_the_signed_zoo_will_do(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """With a key no other folder, address or repository is used."""
    secret, public = keys
    signed(tmp_path / "z", secret)
    for source in ("pico", "other/v1", "https://example.org/t", str(tmp_path / "z"), "org/tuner@v1"):
        with pytest.raises(UserError, match="is not a name in the index that `key` signed"):
            zoo.pull(source, tmp_path / "z", key=str(public))


def test_a_signed_zoo_stays_signed(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    secret, public = keys
    signed(tmp_path / "z", secret)
    with pytest.raises(UserError, match="is signed; give `sign` KEY"):
        zoo.push(make_tuner(seed=1), tmp_path / "z")
    assert signed(tmp_path / "z", secret, seed=1) == "tiny/v2"
    assert [check.problem for check in zoo.verify(tmp_path / "z", str(public))] == [None, None]


def changed_index(folder: Path) -> None:
    """The licence in the index is another."""
    path = folder / "index.json"
    content = json.loads(path.read_text())
    content["tuners"][0]["licence"] = "MIT"
    path.write_text(json.dumps(content))


def cut_signature(folder: Path) -> None:
    path = folder / "index.json.minisig"
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize("change", [changed_index, cut_signature, None])
def test_what_another_changed_or_signed_is_not_signed_again(
    change: Callable[[Path], None] | None, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    folder, (secret, public) = tmp_path / "z", keys
    signed(folder, secret)
    if change is None:
        secret, public = write(tmp_path, "other")
    else:
        change(folder)
    before = (folder / "index.json").read_bytes()
    with pytest.raises(UserError, match="is refused: .* remove index.json.minisig and push again, which signs it anew"):
        signed(folder, secret, seed=1)
    assert (folder / "index.json").read_bytes() == before and not (folder / "tiny/v2").exists()
    (folder / "index.json.minisig").unlink()
    assert signed(folder, secret, seed=1) == "tiny/v2"
    assert not [name for name in os.listdir(folder) if name.endswith(".new")]
    assert zoo.pull("tiny/v2", folder, key=str(public)).path.is_file()


@pytest.mark.parametrize("number", [1, 2])
def test_a_push_that_is_killed_between_index_and_signature_says_so(
    number: int, tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (secret, public) = tmp_path / "z", keys
    for seed in range(number - 1):
        signed(folder, secret, seed=seed)
    replace = os.replace

    def dies(source: Any, target: Any) -> None:
        if str(target).endswith(".minisig"):
            os._exit(0)
        replace(source, target)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(os, "replace", dies)
        signed(folder, secret, seed=5)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    words = "the last push was cut off .* rename it to index.json.minisig"
    for call in (lambda: signed(folder, secret, seed=6), lambda: zoo.verify(folder, str(public))):
        with pytest.raises(UserError, match=words):
            call()
    with pytest.raises(UserError, match="is signed; give `sign` KEY, or remove its index.json.minisig"):
        zoo.push(make_tuner(seed=7), folder)
    told = {check.name: check.problem or "" for check in zoo.verify(folder)}
    assert "a push that was cut off" in told["index.json.minisig.new"]
    replace(folder / "index.json.minisig.new", folder / "index.json.minisig")
    assert len(zoo.verify(folder, str(public))) == number
    assert signed(folder, secret, seed=6) == f"tiny/v{number + 1}"


@pytest.mark.parametrize("index", [True, False])
def test_a_first_push_that_was_killed_leaves_the_zoo_to_its_key(
    index: bool, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    folder, (secret, public) = tmp_path / "z", keys
    signed(folder, secret)
    new = (folder / "index.json.minisig").rename(folder / "index.json.minisig.new")
    if not index:  # killed before it replaced an index that was not signed
        changed_index(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other, other_public = write(tmp_path, "other")
    for content in (new.read_bytes(), b"cut"):
        new.write_bytes(content)
        with pytest.raises(
            UserError, match="index.json.minisig.new beside it, .* is not by the key given; push with the key"
        ):
            signed(folder, other, seed=1)
    new.write_bytes(before[new])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    if index:
        new.rename(folder / "index.json.minisig")
    assert signed(folder, secret, seed=1) == "tiny/v2"
    assert zoo.verify(folder, str(public))
    with pytest.raises(UserError, match="not by the key given"):
        zoo.verify(folder, str(other_public))


@pytest.mark.parametrize("number", [0, 1])
def test_if_the_signature_cannot_be_replaced_the_index_is_put_back(
    number: int, tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (secret, public) = tmp_path / "z", keys
    for seed in range(number):
        signed(folder, secret, seed=seed)
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith(".minisig"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(os, "replace", full)
        signed(folder, secret, seed=5)
    assert not (folder / "index.json.minisig.new").exists() and (folder / "index.json").exists() == bool(number)
    if number:
        zoo.pull("tiny/v1", folder, key=str(public))


def test_an_empty_key_and_a_signature_that_leads_nowhere_are_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = tmp_path / "z"
    make_tuner().save(tmp_path / "t.safetensors")
    with pytest.raises(UserError, match="`sign` is not a file"):
        run("push", tmp_path / "t.safetensors", "--to", folder, "--sign", "")
    assert not folder.exists()
    signed(folder, keys[0])
    (folder / "index.json.minisig").unlink()
    (folder / "index.json.minisig").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is signed; give `sign` KEY"):
        zoo.push(make_tuner(seed=1), folder)
    with pytest.raises(UserError, match="is not signed: there is no index.json.minisig beside it; restore"):
        signed(folder, keys[0], seed=1)


def test_command_line_and_password(tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    secret, public = keys
    locked = minisign.SecretKey.from_file(secret)
    locked.encrypt("open sesame", opslimit=32768, memlimit=2**24)
    secret.write_bytes(bytes(locked))
    make_tuner().save(tmp_path / "t.safetensors")
    push = ("push", tmp_path / "t.safetensors", "--to", tmp_path / "z", "--sign", secret)
    monkeypatch.setenv("METAZO_SIGN_PASSWORD", "close sesame")
    with pytest.raises(UserError, match="wrong password") as error:
        run(*push)
    assert "sesame" not in str(error.value) and not (tmp_path / "z").exists()
    monkeypatch.setenv("METAZO_SIGN_PASSWORD", "open sesame")
    assert "published tiny/v1" in run(*push)
    assert "1 of 1 in order; the index is signed by the key" in run("verify", "--zoo", tmp_path / "z", "--key", public)
    assert "tiny" in run("pull", "tiny/v1", "--zoo", tmp_path / "z", "--key", public)


@pytest.mark.parametrize("text", ["", "x" * 56, "RW" * 28, "/no/such/key", "\0"])
def test_odd_keys_are_refused_and_not_repeated(text: str, tmp_path: Path) -> None:
    (tmp_path / "k").write_text(text)
    zoo.push(make_tuner(), tmp_path / "z")
    (tmp_path / "z/index.json.minisig").write_text("x")
    for call in (lambda: signer(str(tmp_path / "k"), str), lambda: zoo.verify(tmp_path / "z", text)):
        with pytest.raises(UserError) as error:
            call()
        assert not text or text not in str(error.value)


def test_our_signature_is_minisigns(tmp_path: Path) -> None:
    """The documented example of minisign itself verifies, by its published key."""
    path = tmp_path / "file"
    path.with_name("file.minisig").write_text(
        "untrusted comment: signature from minisign secret key\n"
        "RWQf6LRCGA9i59SLOFxz6NxvASXDJeRtuZykwQepbDEGt87ig1BNpWaVWuNrm73YiIiJbq71Wi+dP9eKL8OC351vwIasSSbXxwA=\n"
        "trusted comment: timestamp:1555779966\tfile:test\n"
        "QtKMXWyYcwdpZAlPF7tE2ENJkRd1ujvKjlj1m9RtHTBnZPa5WKU5uWRs5GoP5M/VqE81QFuMKI5k/SfNQUaOAA==\n"
    )
    key = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"
    check_signature(b"test", path, key)
    with pytest.raises(UserError, match="signature verification failed"):
        check_signature(b"Test", path, key)


def test_without_the_extra_one_sentence(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    program = (
        "import sys; sys.modules['minisign'] = None; from metazo import zoo\n"
        "try:\n    zoo.pull('a/v1', sys.argv[1], key='k')\nexcept Exception as e:\n    print(type(e).__name__, e)"
    )
    signed(tmp_path / "z", keys[0])
    done = warm.run("-c", program, tmp_path / "z")
    assert done.stdout.strip() == (
        "MissingPackage signatures need py-minisign, which is not installed: pip install 'metazo[sign]'"
    )
