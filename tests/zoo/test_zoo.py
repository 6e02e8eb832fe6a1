"""Zoo folders: publish, find, verify, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metazo import zoo
from metazo.errors import UserError
from metazo.io.files import safe_name
from metazo.io.lock import FolderLock
from metazo.tuner.file import BlockSpec, Tuner, TunerInfo
from metazo.tuner.networks import PertNN
from metazo.zoo.index import add, read_index, write_index
from metazo.zoo.log import Log
from tests import warm
from tests.io.test_lock import named
from tests.zoo.conftest import SHAPES, make_tuner
from tests.zoo.test_cli import run
from tests.zoo.test_log import log_bytes


def test_push_then_find_load_verify(tmp_path: Path, home: Path) -> None:
    file = tmp_path / "run" / "tuner.safetensors"
    make_tuner(scores={"cb": {"loss": 0.5}}, recipe={"steps": 10}).save(file)
    assert zoo.push(file.parent) == "tiny/v1"
    assert zoo.push(make_tuner(seed=1), licence="Apache-2.0") == "tiny/v2"
    folder = home / "zoo" / "tiny" / "v1"
    assert {path.name for path in folder.iterdir()} == {"tuner.safetensors", "card.md"}
    card = (folder / "card.md").read_text()
    assert "| cb.loss | 0.5 |" in card and "| steps | 10 |" in card and "none stated" in card
    own = [found.entry.name for found in zoo.tuners() if found.where != "bundled"]
    assert own == ["tiny/v1", "tiny/v2"]
    assert torch.equal(zoo.load("tiny/v1").pertnn.w1, make_tuner().pertnn.w1)
    assert torch.equal(zoo.load("tiny").pertnn.w1, make_tuner(seed=1).pertnn.w1)  # the last published
    assert zoo.load("tiny").info.licence == "Apache-2.0"
    assert [check.problem for check in zoo.verify()] == [None] * len(zoo.entries())  # the bundled ones as well


def test_without_a_home_folder_there_are_the_bundled_and_the_named_zoos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that is started with a user id of its own (docker run --user 12345)."""
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert {found.where for found in zoo.tuners()} == {"bundled"}
    with pytest.raises(UserError, match=r"this user has no home folder .*; set HOME or HF_HOME to a folder"):
        zoo.push(make_tuner())
    monkeypatch.setenv("METAZO_ZOO", str(tmp_path / "z"))
    assert zoo.push(make_tuner()) == "tiny/v1" and zoo.load("tiny/v1")


def test_find_by_fingerprint_comes_before_the_name(tmp_path: Path) -> None:
    unknown = [BlockSpec(name, [(name, None)]) for name, _ in SHAPES]
    other = [BlockSpec("w", [("w", (3,))])]
    zoo.push(Tuner(PertNN(1), TunerInfo("derivative", other)))
    zoo.push(Tuner(PertNN(2), TunerInfo("published", unknown)))
    zoo.push(make_tuner("org/base"), tmp_path / "z")
    found = zoo.find(SHAPES, "derivative", tmp_path / "z")
    assert [(one.entry.name, one.why) for one in found] == [
        ("org/base/v1", "fingerprint"),
        ("published/v1", "names"),
        ("derivative/v1", "base model"),
    ]
    assert zoo.find([("x", (1,))]) == []


def test_a_damaged_tuner_does_not_hide_the_others(tmp_path: Path) -> None:
    names = Tuner(PertNN(1), TunerInfo("other/model", [BlockSpec("a.weight", [("a.weight", None)])]))
    zoo.push(names, tmp_path / "z")
    zoo.push(make_tuner("org/base"), tmp_path / "z")
    damaged = tmp_path / "z" / "other/model/v1/tuner.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert [one.entry.name for one in zoo.find(SHAPES, zoo=tmp_path / "z")] == ["org/base/v1"]
    assert zoo.find([("a.weight", (3,))], zoo=tmp_path / "z") == []
    assert [check.name for check in zoo.verify(tmp_path / "z") if check.problem] == ["other/model/v1"]


def test_path_of_a_base_model_is_not_published(tmp_path: Path) -> None:
    assert zoo.push(make_tuner(str(tmp_path / "My model!"))) == "My-model/v1"
    assert str(tmp_path) not in (zoo.named("My-model/v1").path.parent / "card.md").read_text()  # type: ignore[union-attr]
    assert zoo.load("My-model").info.base_model == "My-model"


def test_models_of_two_runs_are_two_base_models(tmp_path: Path) -> None:
    names = []
    for folder in (tmp_path / "sst2" / "model", tmp_path / "boolq" / "model"):
        folder.mkdir(parents=True)
        names.append(zoo.zoo_base(str(folder)))
    assert [*names, zoo.zoo_base("model")] == ["sst2", "boolq", "model"]


@pytest.mark.parametrize(
    "name",
    ["..", "../x", "a/../b", "/etc/x", "a//b", "", ".hidden", "a\\b", "C:x", "nul", "COM1.txt", "a/con", "a ", "a.",
     "a\nb", "é", "x" * 97, "a/b/c/d/e", "~x", "a\0b"],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refused"):
        safe_name(name, "name")
    if name:
        with pytest.raises(UserError, match="refused"):
            zoo.push(make_tuner(), tmp_path / "z", base=name)
        with pytest.raises(UserError, match="refused"):
            zoo.push(make_tuner(), tmp_path / "z", version=name)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "name",
    ["index.json", "Index.JSON", "index.json.minisig", "index.json.minisig.new", "tiny/card.md", "tiny/Steps.jsonl"],
)
def test_names_of_the_zoo_s_own_files_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    for options in ({"base": name}, {"base": "tiny", "version": name}):
        with pytest.raises(UserError, match="a zoo has files of its own called .*; choose another `name` or `version`"):
            zoo.push(make_tuner(), tmp_path / "z", **options)
        assert not (tmp_path / "z").exists()


def test_a_taken_name_and_a_link_out_of_the_zoo_are_refused(tmp_path: Path) -> None:
    zoo.push(make_tuner(), tmp_path / "z", version="1.0")
    zoo.push(make_tuner(), tmp_path / "z", version="1.0")  # the same bytes are accepted
    with pytest.raises(UserError, match="already in the zoo"):
        zoo.push(make_tuner(seed=1), tmp_path / "z", version="1.0")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "z" / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="through a link"):
        zoo.push(make_tuner(), tmp_path / "z", base="linked")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("linked", ["tiny", "tiny/v1/tuner.safetensors"])
def test_what_a_link_out_of_the_zoo_leads_to_is_not_read(tmp_path: Path, linked: str) -> None:
    zoo.push(make_tuner(), tmp_path / "z")
    (tmp_path / "z").rename(tmp_path / "whole")
    (tmp_path / "moved").symlink_to(tmp_path / "whole")  # a link to the zoo itself is none out of it
    assert zoo.verify(tmp_path / "moved")[0].problem is None and zoo.load("tiny", tmp_path / "moved")
    (tmp_path / "whole" / linked).rename(tmp_path / "elsewhere")
    (tmp_path / "whole" / linked).symlink_to(tmp_path / "elsewhere")
    assert "leads out of the zoo through a link" in str(zoo.verify(tmp_path / "whole")[0].problem)
    for get in (zoo.load, zoo.pull):
        with pytest.raises(UserError, match="leads out of the zoo through a link; remove the link"):
            get("tiny", tmp_path / "whole")


def test_a_source_is_called_as_the_caller_calls_it(tmp_path: Path) -> None:
    address = "https://example.org/t#sha256=00"
    for get, called in ((zoo.read, "source"), (zoo.pull, "source"), (zoo.load, "tuner"), (zoo.load_feedback, "tuner")):
        for what, fault in (("nosuch", "'nosuch' is not a file"), (tmp_path, f"{tmp_path} is a folder"), (address, "")):
            with pytest.raises(UserError, match=f"`{called}` {fault}"):
                get(what, report=lambda text: None)


def test_unfit_tuner_leaves_the_zoo_alone(tmp_path: Path) -> None:
    broken = make_tuner()
    torch.nn.init.constant_(broken.pertnn.b2, float("nan"))
    with pytest.raises(UserError, match="NaN"):
        zoo.push(broken, tmp_path / "z")
    (tmp_path / "t.safetensors").write_bytes(make_tuner().to_bytes()[:-9])
    with pytest.raises(UserError, match="cut short"):
        zoo.push(tmp_path / "t.safetensors", tmp_path / "z")
    assert not (tmp_path / "z").exists()


def test_verify_names_each_kind_of_damage(tmp_path: Path) -> None:
    folder = tmp_path / "z"
    for number in range(4):
        zoo.push(make_tuner(seed=number), folder)
    (folder / "tiny/v1/tuner.safetensors").unlink()
    (folder / "tiny/v2/tuner.safetensors").write_bytes(make_tuner(seed=9).to_bytes())
    with (folder / "tiny/v3/tuner.safetensors").open("ab") as file:
        file.write(b"x")
    make_tuner().save(folder / "stray/tuner.safetensors")
    problems = {check.name: check.problem or "" for check in zoo.verify(folder)}
    assert "is not a file" in problems["tiny/v1"]
    assert "has sha256" in problems["tiny/v2"]
    assert "bytes and the zoo index says" in problems["tiny/v3"]
    assert problems["tiny/v4"] == ""
    assert "not in index.json" in problems["stray"]
    with pytest.raises(UserError, match="has sha256"):
        zoo.load("tiny/v2", folder)


def rewritten(folder: Path, **fields: Any) -> None:
    """The index with other fields of its first entry."""
    path = folder / "index.json"
    content = json.loads(path.read_text())
    content["tuners"][0] |= fields
    path.write_text(json.dumps(content))


def test_verify_says_what_it_did_not_see(tmp_path: Path) -> None:
    folder = tmp_path / "z"
    for seed in range(3):
        zoo.push(make_tuner(seed=seed), folder)
    rewritten(folder, url="https://example.org/t")
    (folder / "tiny/v1/tuner.safetensors").unlink()
    (folder / "tiny/v2/card.md").write_text("# a better tuner")
    (folder / "tiny/v3/card.md").unlink()
    (folder / "tiny/v3/notes.txt").write_text("x")
    (folder / "README.md").write_text("x")
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("x")
    found = {
        check.name: (check.problem, check.note, check.seen) for check in zoo.verify(folder) if check.where == "zoo"
    }
    assert found.pop("tiny/v1") == (None, "not here, not checked", False)
    assert found.pop("README.md") == (None, "not in index.json, not checked", False)
    assert found.pop("tiny/v3/notes.txt") == ("is not in index.json", None, True)
    (problem, changed, _), (_, missing, _) = found.pop("tiny/v2"), found.pop("tiny/v3")
    assert problem is None and "card.md is not what this metazo writes" in str(changed)
    assert "card.md is missing" in str(missing) and not found
    shown = run("verify", "--zoo", folder, code=1)
    count = 2 + len(zoo.entries(folder))  # and two files
    assert f"{count - 3} of {count} in order, 2 not checked" in shown and "not here, not checked" in shown


def test_the_bundled_cards_are_what_this_metazo_writes() -> None:
    assert {(check.problem, check.note) for check in zoo.verify()} == {(None, None)}


@pytest.mark.parametrize(("fields", "words"), [
    ({"licence": "MIT"}, "says licence None and the zoo index says 'MIT'"),
    ({"base_model": "pico"}, "says base_model 'tiny' and the zoo index says 'pico'"),
])  # fmt: skip
def test_an_index_that_contradicts_its_file_is_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    zoo.push(make_tuner(), tmp_path / "z")
    rewritten(tmp_path / "z", **fields)
    assert words in str(zoo.verify(tmp_path / "z")[0].problem)
    with pytest.raises(UserError, match=words):
        zoo.load("tiny/v1", tmp_path / "z")


@pytest.mark.parametrize("licence", ["", " ", "MIT\nGPL", "x" * 600])
def test_a_licence_that_is_no_line_of_text_is_refused(licence: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(log_bytes())
    for push in (lambda: zoo.push(make_tuner(), tmp_path / "z", licence=licence),
                 lambda: zoo.push_log(path, tmp_path / "z", licence=licence)):  # fmt: skip
        with pytest.raises(UserError, match="`licence` is .* not a line of text; give its name"):
            push()
    assert not (tmp_path / "z").exists()


def test_an_index_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    zoo.push(make_tuner(), tmp_path / "z")
    (entry,) = read_index(tmp_path / "z")
    before = (tmp_path / "z/index.json").read_bytes()
    for entries in ([replace(entry, licence="")], [entry, entry]):
        with pytest.raises(UserError, match="licence is not a line of text|is listed twice"):
            write_index(tmp_path / "z", entries)
    assert (tmp_path / "z/index.json").read_bytes() == before


def test_a_damaged_index_is_made_again_as_its_message_says(tmp_path: Path) -> None:
    for seed in range(2):
        zoo.push(make_tuner(seed=seed), tmp_path / "z")
    before = (tmp_path / "z/index.json").read_bytes()
    (tmp_path / "z/index.json").write_bytes(before[:-9])
    with pytest.raises(UserError, match="remove it with its signature and push the files .* each with its `version`"):
        zoo.push(make_tuner(seed=2), tmp_path / "z")
    (tmp_path / "z/index.json").unlink()
    for version in ("v1", "v2"):
        zoo.push(tmp_path / "z/tiny" / version, tmp_path / "z", version=version)
    assert (tmp_path / "z/index.json").read_bytes() == before


def test_a_file_that_the_index_does_not_list_is_not_replaced(tmp_path: Path) -> None:
    """An index that is made again does not list all files at first, and a push that was killed leaves one."""
    for seed in range(2):
        zoo.push(make_tuner(seed=seed), tmp_path / "z")
    files = [tmp_path / f"z/tiny/v{number}/tuner.safetensors" for number in (1, 2)]
    before = [file.read_bytes() for file in files]
    (tmp_path / "z/index.json").unlink()
    with pytest.raises(UserError, match="tiny/v1/tuner.safetensors is another file, which index.json does not list"):
        zoo.push(make_tuner(seed=2), tmp_path / "z", version="v1")
    assert zoo.push(make_tuner(seed=2), tmp_path / "z") == "tiny/v3"
    assert [file.read_bytes() for file in files] == before
    (tmp_path / "z/index.json").unlink()
    assert zoo.push(make_tuner(seed=1), tmp_path / "z") == "tiny/v2", "the same file takes its own place"
    with pytest.raises(UserError, match="tiny/v1/tuner.safetensors is another file"):
        add(Log.from_bytes(log_bytes(), "log"), log_bytes(), tmp_path / "z", "tiny", "v1")


def test_verify_waits_for_a_push_that_has_not_written_its_index(tmp_path: Path) -> None:
    zoo.push(make_tuner(), tmp_path / "z")
    index = (tmp_path / "z/index.json").read_bytes()
    with ThreadPoolExecutor() as threads:
        with FolderLock(tmp_path / "z"):
            (tmp_path / "z/index.json").unlink()
            checks = threads.submit(zoo.verify, tmp_path / "z")
            with suppress(TimeoutError):
                checks.exception(0.1)
            (tmp_path / "z/index.json").write_bytes(index)
        assert [check.problem for check in checks.result() if check.where == "zoo"] == [None]


def test_a_tuner_that_is_pushed_again_keeps_its_place(tmp_path: Path) -> None:
    """The last one is what `tuner='auto'` and the name of a base model take."""
    for seed in (0, 1, 0):
        zoo.push(make_tuner(seed=seed), tmp_path / "z", version=f"v{seed}")
    assert [entry.name for entry in read_index(tmp_path / "z")] == ["tiny/v0", "tiny/v1"]


def test_pull_of_a_folder_keeps_a_copy_that_the_fingerprint_finds(tmp_path: Path, home: Path) -> None:
    zoo.push(make_tuner(), tmp_path / "z")
    found = zoo.pull(tmp_path / "z")
    assert found.path.is_relative_to(home / "cache")
    assert zoo.pull(tmp_path / "z/tiny/v1").path == found.path
    assert [(one.where, one.why) for one in zoo.find(SHAPES)] == [("cache", "fingerprint")]
    zoo.push(make_tuner(seed=1), tmp_path / "z")
    with pytest.raises(UserError, match="zoo of tiny/v1, tiny/v2"):
        zoo.pull(tmp_path / "z")
    with pytest.raises(UserError, match="a name in the zoos"):
        zoo.pull("nowhere")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        zoo.pull("org/nowhere@v1")


def test_two_processes_pull_and_push_at_once(tmp_path: Path) -> None:
    for number in range(2):
        make_tuner("other", seed=number).save(tmp_path / f"{number}.safetensors")
    program = (
        "import sys; from metazo import zoo; zoo.pull(sys.argv[1]); zoo.pull(sys.argv[2]);"
        "[zoo.push(sys.argv[2], sys.argv[3]) for _ in range(5)]"
    )
    paths = [str(tmp_path / "0.safetensors"), str(tmp_path / "1.safetensors")]
    running = [warm.Process("-c", program, paths[0], path, tmp_path / "z") for path in paths]
    assert [process.wait() for process in running] == [0, 0]
    names = sorted(entry.name for entry in read_index(tmp_path / "z"))
    assert names == sorted(f"other/v{number}" for number in range(1, 11))
    assert {check.problem for check in zoo.verify(tmp_path / "z")} == {None}
    assert len([found for found in zoo.tuners() if found.where == "cache"]) == 2
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "z/.lock").exists()


def test_a_push_that_waits_too_long_names_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tuner("other").save(tmp_path / "t.safetensors")
    zoo.push(str(tmp_path / "t.safetensors"), tmp_path / "z")
    before = (tmp_path / "z/index.json").read_bytes()
    program = (
        "import sys; from pathlib import Path; from metazo.io.lock import FolderLock;"
        "lock = FolderLock(Path(sys.argv[1])).acquire(); print(1, flush=True); sys.stdin.read()"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "z")], **pipes)
    assert holder.stdout is not None and holder.stdout.readline()
    monkeypatch.setattr("metazo.zoo.index.PATIENCE", 0.1)
    with pytest.raises(UserError, match=f"in use by {named(holder.pid, ' on ')}"):
        zoo.push(str(tmp_path / "t.safetensors"), tmp_path / "z")
    assert (tmp_path / "z/index.json").read_bytes() == before
    holder.kill()
    holder.communicate()
    zoo.push(str(tmp_path / "t.safetensors"), tmp_path / "z")
    assert not (tmp_path / "z/.lock").exists()


LISTED = {"name": "tiny/v1", "base_model": "tiny", "sha256": "0" * 64, "size": 1, "fingerprint": None, "blocks": 1}
LISTED |= {"licence": None}
INDEXES: dict[str, tuple[Any, str]] = {
    "a list": ([], "format_version"),
    "version": ({"format_version": 9, "tuners": []}, "format_version"),
    "entry": ({"format_version": 1, "tuners": ["x"]}, "entry 0: its fields"),
    "climbing name": ("../../x", "refused"),
    "absolute name": ("/etc/x", "refused"),
    "number": (7, "not a line of text"),
    "kind": ({"format_version": 1, "tuners": [LISTED | {"kind": []}]}, "kind is none of tuner, feedback, log"),
    "a name twice": ("tiny/v2", "entry 1: tiny/v2 is listed twice"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_broken_index_is_refused(case: str, tmp_path: Path) -> None:
    content, words = INDEXES[case]
    for seed in range(2):
        zoo.push(make_tuner(seed=seed), tmp_path / "z")
    path = tmp_path / "z" / "index.json"
    if not isinstance(content, dict | list):
        name, content = content, json.loads(path.read_text())
        content["tuners"][0]["name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        zoo.tuners(tmp_path / "z")
