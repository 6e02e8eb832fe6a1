"""A fine-tuned model published as its step log: pushed, shown, pulled, and rebuilt bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metazo import zoo
from metazo.errors import UserError
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.replay import replay
from metazo.step.record import Step
from metazo.steplog.format import encode, line, scan
from metazo.zoo.index import read_index
from metazo.zoo.log import Log
from tests.zoo.conftest import make_tuner
from tests.zoo.test_cli import run

HEADER: dict[str, Any] = {
    "metazo_steps": 1, "model": "/home/me/models/tiny", "weights": "a" * 64, "task": "mine", "method": "mezo",
    "precision": "auto", "settings": {"model": "/home/me/models/tiny", "task": "../mine.yaml", "lr": 0.1,
                                      "tuner": "https://me:hf_secret@example.org/t?token=hf_secret"},
}  # fmt: skip
STEPS = [Step(n, (n,), (1.0, 2.0), (0.5,), (1e-4,)) for n in range(3)]
END = {"kept": 2, "weights": "b" * 64}


def log_bytes(header: dict[str, Any] = HEADER, steps: list[Step] = STEPS, end: dict[str, Any] | None = END) -> bytes:
    parts, chain = [], 0
    for record in [header, *map(encode, steps), *([end] if end else [])]:
        part, chain = line(record, chain)
        parts.append(part)
    return b"".join(parts)


def test_a_run_is_published_and_rebuilt_to_the_bit(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_settings(
        FinetuneConfig(
            model="pico", task="pico_sentiment", out=out, lr=1e-4, steps=6, batch_size=4, train_examples=20,
            dev_examples=10, test_examples=0, keep="last",
        )
    )  # fmt: skip
    assert "published pico-pico_sentiment/v1" in run("push", "--log", out / "steps.jsonl", "--licence", "MIT")
    assert zoo.push(make_tuner("pico")) == "pico/v1"
    listed = {entry["name"]: entry for entry in json.loads(run("list", "--json"))}
    assert listed["pico-pico_sentiment/v1"]["kind"] == "log" and listed["pico-pico_sentiment/v1"]["licence"] == "MIT"
    assert "step log" in run("list")
    shown = json.loads(run("show", "pico-pico_sentiment", "--json"))
    assert (
        shown["steps"] == 6
        and shown["method"] == "mezo"
        and shown["weights"] == scan(out / "steps.jsonl").header["weights"]
    )
    pulled = Path(json.loads(run("pull", "pico-pico_sentiment", "--json"))["path"])
    replayed = replay(pulled, "pico", tmp_path / "rebuilt")
    assert replayed.identical and replayed.steps == 6
    assert all(check.problem is None for check in zoo.verify())
    text = (pulled.parent / "card.md").read_text()
    assert f"| sha256 of the model's weights | {replayed.weights} |" in text and "metazo replay" in text


def test_paths_and_secrets_are_not_published(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(log_bytes())
    name = zoo.push_log(path, tmp_path / "z")
    assert name == "tiny-mine/v1"
    everything = b"".join(file.read_bytes() for file in (tmp_path / "z").rglob("*") if file.is_file())
    assert b"/home" not in everything and b"hf_secret" not in everything and b"https://example.org/t" in everything
    published = zoo.read(name, tmp_path / "z")
    assert isinstance(published, Log) and published.steps == STEPS and published.end == END
    assert published.header["settings"] == {
        "model": "tiny", "task": "mine.yaml", "lr": 0.1, "tuner": "https://example.org/t",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("objective", "secret/project/rw.py:brevity", "rw.py:brevity"),
        ("objective", "secret/rw.py:brevity", "rw.py:brevity"),
        ("objective", "/secret/rw.py:brevity", "rw.py:brevity"),
        ("objective", "accuracy", "accuracy"),
        ("tuner", "secret/sub/t.safetensors", "t.safetensors"),
        ("tuner", "secret/t.safetensors", "t.safetensors"),
        ("tuner", "secret/t.safetensors#sha256=ab", "t.safetensors#sha256=ab"),
        ("tuner", "org/name@v1", "org/name@v1"),
        ("task", "secret/mine.yaml", "mine.yaml"),
        ("data", "secret/of/mine", "mine"),
        ("wording", "good/bad/neither", "good/bad/neither"),
        ("task", "x" * 5000, "x" * 5000),
    ],
)
def test_relative_paths_are_not_published(name: str, value: str, kept: str) -> None:
    log = Log.from_bytes(log_bytes(HEADER | {"settings": {"model": "tiny", name: value}}), "log")
    assert log.published("tiny").header["settings"] == {"model": "tiny", name: kept}


def test_texts_that_look_like_paths_are_published_as_they_are() -> None:
    """Label phrases, prompts and names of classes, from which a replay makes the head and the model's labels again."""
    texts = {
        "head": {"phrases": ["/home/refunds", "~/delivery"]},
        "definition": {"prompt": "/help {text}", "labels": "{}"},
        "trained": {"task": "mine", "labels": ["/ok", "../no"]},
    }
    published = Log.from_bytes(log_bytes(HEADER | texts), "a log").published("tiny").header
    assert {name: published[name] for name in texts} == texts and published["settings"]["task"] == "mine.yaml"


def test_what_is_published_does_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch) -> None:
    settings = {"model": "tiny", "task": "sst2", "tuner": "org/tuner", "data": "data/mine", "objective": "own/good"}
    kept = settings | {"data": "mine", "objective": "good"}
    (run := tmp_path / "run").mkdir()
    (run / "steps.jsonl").write_bytes(log_bytes(HEADER | {"settings": settings}))
    for name in ("here/org/tuner", "here/sst2", "elsewhere", "began/org/tuner"):
        (tmp_path / name).mkdir(parents=True)

    def published(where: str, to: str) -> object:
        monkeypatch.chdir(tmp_path / where)
        return zoo.read(zoo.push_log(run, tmp_path / to, name="n"), tmp_path / to).header["settings"]  # type: ignore

    assert published("here", "a") == published("elsewhere", "b") == kept
    (run / "config.json").write_text(json.dumps({"started_in": str(tmp_path / "began")}))
    assert published("here", "c") == published("elsewhere", "d") == kept | {"tuner": "tuner"}


def test_a_log_is_no_tuner_and_is_found_by_its_name_alone(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(log_bytes())
    zoo.push_log(path, tmp_path / "z", name="mine")
    zoo.push(make_tuner("tiny"), tmp_path / "z")
    assert [found.entry.name for found in zoo.find([("x", (1,))], "tiny", tmp_path / "z")] == ["tiny/v1"]
    assert zoo.named("tiny", tmp_path / "z").entry.kind == "tuner"  # type: ignore[union-attr]
    with pytest.raises(UserError, match="is a model's step log, not a tuner"):
        zoo.load("mine/v1", tmp_path / "z")
    with pytest.raises(UserError, match="give either a tuner or --log"):
        run("push", "--to", tmp_path / "z")


def damaged(data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    return b"".join([lines[0], lines[1].replace(b"0.5", b"0.6"), *lines[2:]])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (damaged(log_bytes()), "line 2 is bad"),
        (log_bytes()[:-20], "torn record"),
        (log_bytes(steps=[], end=None), "holds no steps"),
        (log_bytes(HEADER | {"weights": "zz"}), "header has no weights"),
        (log_bytes(HEADER | {"model": "a\nb"}), "header has no model"),
        (log_bytes(HEADER | {"settings": json.loads("[" * 50 + "]" * 50)}), "no plain table"),
        (log_bytes(HEADER | {"task": "\x1b[2J"}), "no plain table"),
        (b"{}", "is not a step log"),
        (log_bytes(HEADER | {"method": "first-order-adamw"}), "steps of first-order-adamw do not follow"),
        (log_bytes(HEADER | {"settings": {"head": "prototype"}}), "head was made from the training data"),
    ],
)
def test_what_cannot_be_published(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words) as error:
        zoo.push_log(path, tmp_path / "z")
    assert str(path) in str(error.value) and not (tmp_path / "z").exists()


def test_a_changed_log_in_a_zoo_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(log_bytes())
    zoo.push_log(path, tmp_path / "z", name="mine")
    other = log_bytes(HEADER | {"model": "tiny", "settings": {}})
    (tmp_path / "z/mine/v1/steps.jsonl").write_bytes(other)
    (check,) = zoo.verify(tmp_path / "z")[:1]
    assert "bytes and the zoo index says" in (check.problem or "")
    with pytest.raises(UserError, match="it is refused"):
        zoo.pull("mine/v1", tmp_path / "z")


def test_blocks_of_a_log_in_an_index_are_refused(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_bytes(log_bytes())
    run("push", "--log", tmp_path / "steps.jsonl", "--to", tmp_path / "zoo", "--name", "mine")
    index = tmp_path / "zoo" / "index.json"
    entries = json.loads(index.read_text())
    assert '"blocks": 0' in index.read_text() and entries
    index.write_text(index.read_text().replace('"blocks": 0', '"blocks": 7'))
    with pytest.raises(UserError, match="is a log, of which the zoo index names blocks"):
        zoo.pull("mine", zoo=tmp_path / "zoo")


def test_the_licence_is_kept(tmp_path: Path) -> None:
    """It is in the index alone: a pull keeps it, and so does the same log pushed again without one."""
    path = tmp_path / "steps.jsonl"
    path.write_bytes(log_bytes())

    def push(*licence: str) -> str | None:
        run("push", "--log", path, "--to", tmp_path / "z", "--version", "v1", *licence)
        (entry,) = read_index(tmp_path / "z")
        assert f"| licence | {entry.licence} |" in (tmp_path / "z" / entry.name / "card.md").read_text()
        return entry.licence

    assert push("--licence", "MIT") == push() == "MIT" and push("--licence", "GPL-3.0") == "GPL-3.0"
    for _ in range(2):
        assert json.loads(run("pull", "tiny-mine/v1", "--zoo", tmp_path / "z", "--json"))["licence"] == "GPL-3.0"
    pulled = zoo.pull("tiny-mine/v1#sha256=" + read_index(tmp_path / "z")[0].sha256)  # from the cache
    assert pulled.entry.licence == "GPL-3.0"


@pytest.mark.parametrize(
    ("tuner", "row", "option"),
    [
        (None, "", "--base tiny --out DIR"),
        ("auto", "| tuner | auto, whose networks have the sha256 cccc", "--base tiny --tuner TUNER --out DIR"),
        ("random:3", "| tuner | random:3, whose networks", "--base tiny --tuner random:3 --out DIR"),
    ],
)
def test_the_card_says_how_to_give_the_tuner(tuner: str | None, row: str, option: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(log_bytes(HEADER | {"settings": {"tuner": tuner}, "tuner": "c" * 64 if tuner else None}))
    card = (tmp_path / "z" / zoo.push_log(path, tmp_path / "z") / "card.md").read_text()
    assert row in card and f"    metazo replay LOG {option}\n" in card and ("TUNER is" in card) == (tuner == "auto")
