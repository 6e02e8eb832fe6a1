"""A packed comparison is equivalent: it gives the same report, and the same files when it is continued."""

from __future__ import annotations

import json
import lzma
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from metazo.comparisons.packed import RUNS, is_packed, pack, read_runs, unpack
from metazo.comparisons.results import COMPARISON, Result, cell_path, read_search
from metazo.errors import UserError
from metazo.io.files import whole_file
from metazo.io.lock import FolderLock
from metazo.report.build import build
from metazo.report.comparison import Comparison
from metazo.report.write import curves_csv, html, markdown, runs_csv
from tests.fuzz.kind import zeros
from tests.report import synthetic

COLUMNS = synthetic.COLUMNS[:3]


def comparison(folder: Path) -> Path:
    return synthetic.write(folder / "mine", COLUMNS, ["sst2", "rte"], 2)


def everything(folder: Path) -> list[str]:
    report = build(Comparison(folder))
    return [html(report), markdown(report), runs_csv(report.data), curves_csv(report.data)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_report_is_the_same_to_the_byte_and_unpacking_gives_the_files_back(tmp_path: Path) -> None:
    folder = comparison(tmp_path)
    failed = synthetic.result(COLUMNS[1], "rte", 1, status="failed", reason="No room.")
    failed.save(cell_path(folder, "rte", COLUMNS[1].name, "seed", 1))
    before, report = files(folder), everything(folder)
    size, packed = pack(folder)
    assert sorted(files(folder)) == ["comparison.json", "grid.yaml", "runs.jsonl.xz"] and packed < size / 5
    assert everything(folder) == report
    unpack(folder)
    assert files(folder) == before and not is_packed(folder)
    unpack(folder)
    assert files(folder) == before


def test_what_a_process_leaves_that_is_killed_as_it_packs_is_of_no_effect(tmp_path: Path) -> None:
    """Its searches were read as those of a later grid."""
    folder = comparison(tmp_path)
    before, cells = files(folder), tmp_path / "cells"
    pack(folder)
    about = (folder / COMPARISON).read_bytes()
    unpack(folder)
    (folder / COMPARISON).write_bytes(about)  # it is written before the runs, and removed after them
    assert read_search(folder)["sst2"] and not is_packed(folder)
    (folder / "search.json").rename(cells)
    assert read_search(folder) == {}
    cells.rename(folder / "search.json")
    unpack(folder)
    assert files(folder) == before


def test_the_lines_can_be_read_without_metazo(tmp_path: Path) -> None:
    folder = comparison(tmp_path)
    one = json.loads(cell_path(folder, "sst2", "mezo", "seed", 1).read_text())
    searches = json.loads((folder / "search.json").read_text())
    pack(folder)
    rows = [json.loads(line) for line in lzma.decompress((folder / RUNS).read_bytes()).splitlines()]
    (row,) = [row for row in rows if row.pop("file") == "sst2/mezo/seed-1.json"]
    assert row == one and len(rows) == len(COLUMNS) * 4
    assert json.loads((folder / COMPARISON).read_text())["search"] == searches


def test_nothing_is_packed_that_would_not_come_back(tmp_path: Path) -> None:
    folder = comparison(tmp_path)
    path = cell_path(folder, "sst2", "mezo", "seed", 0)
    whole = path.read_bytes()
    for content in (whole[:100], whole.replace(b'"label"', b'"Label"', 1).replace(b"\n", b"\n\n", 1)):
        path.write_bytes(content)
        before = files(folder)
        with pytest.raises(UserError):
            pack(folder)
        assert files(folder) == before
    path.write_bytes(whole)
    pack(folder)
    with pytest.raises(UserError, match="is packed already"):
        pack(folder)


@pytest.mark.parametrize(
    "name", ["sst2/mezo/notes.txt", "mine/a/b/x.json", "x.json", "sst2/link.json", "rte/mezo/link"]
)
def test_nothing_is_removed_that_is_not_packed(tmp_path: Path, name: str) -> None:
    """All of `cells` was removed, with whatever else was in it."""
    folder = comparison(tmp_path)
    path = folder / "cells" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if "link" in name:
        path.symlink_to(folder / "grid.yaml")
    else:
        path.write_text("{}")
    before = files(folder)
    with pytest.raises(UserError, match=rf"{path} is not the file of a run .*; move it out of {folder}/cells\."):
        pack(folder)
    assert files(folder) == before
    path.unlink()
    pack(folder)
    assert is_packed(folder)


def test_what_a_killed_process_had_not_finished_does_not_hinder(tmp_path: Path) -> None:
    folder = comparison(tmp_path)
    path = cell_path(folder, "sst2", "mezo", "seed", 7)
    with whole_file(path):
        (left,) = path.parent.glob(".*")
    path.rename(left)
    (folder / "cells" / "sst2" / "empty").mkdir()
    pack(folder)
    assert is_packed(folder) and not (folder / "cells").exists()


def test_two_files_are_all_that_is_shared(tmp_path: Path) -> None:
    """They have the grid, without which the report knows no reference and no time budget."""
    folder = comparison(tmp_path)
    grid = yaml.safe_load((folder / "grid.yaml").read_text()) | {"reference": COLUMNS[1].name, "time_budget": 9}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    pack(folder)
    whole = build(Comparison(folder))
    (folder / "grid.yaml").unlink()
    again = build(Comparison(folder))
    assert again.data.reference == COLUMNS[1].name and again.story == whole.story and again.tables == whole.tables
    about = json.loads((folder / COMPARISON).read_text())
    (folder / COMPARISON).write_text(json.dumps({name: value for name, value in about.items() if name != "grid"}))
    assert "grid.yaml is missing or cannot be read" in build(Comparison(folder)).story.facts[-1][1]


def test_nothing_is_packed_while_a_comparison_runs(tmp_path: Path) -> None:
    folder = comparison(tmp_path)
    before = files(folder)
    for held in (folder, folder / "parts" / "1-of-2"):
        with FolderLock(held), pytest.raises(UserError, match="is in use by"):
            pack(folder)
        assert before.items() <= files(folder).items() and not is_packed(folder)
    pack(folder)
    with pytest.raises(UserError, match="holds no results"):
        pack(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def forged(folder: Path, data: bytes, runs: int) -> None:
    (folder / RUNS).write_bytes(lzma.compress(data))
    about = {"format_version": 1, "runs": runs, "sha256": sha256(data).hexdigest(), "search": {}}
    (folder / COMPARISON).write_text(json.dumps(about))


def test_damaged_and_hostile_packs_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = comparison(tmp_path)
    pack(folder)
    whole, about = (folder / RUNS).read_bytes(), (folder / COMPARISON).read_bytes()
    lines = lzma.decompress(whole)
    for data in (whole[:-20], b"", b"x" * 100, whole[:200] + b"\0" + whole[201:], lzma.compress(lines[:-10])):
        (folder / RUNS).write_bytes(data)
        with pytest.raises(UserError, match=r"runs\.jsonl\.xz"):
            list(read_runs(folder))
    (folder / RUNS).write_bytes(whole)
    with monkeypatch.context() as patched:  # too many lines, none of which is too long
        patched.setattr("metazo.comparisons.packed.MAX_BYTES", len(lines) - 1)
        with pytest.raises(UserError, match=r"runs\.jsonl\.xz holds more than a comparison may"):
            list(read_runs(folder))
    (folder / RUNS).write_bytes(zeros(128))  # one long line
    with pytest.raises(UserError, match=r"runs\.jsonl\.xz holds more than a comparison may"):
        list(read_runs(folder))
    for count, data in ((1, b"[" * 10**5), (1, b"[]"), (1, b"{}"), (1, b'{"file": 3}')):
        forged(folder, data, count)
        with pytest.raises(UserError, match=r"runs\.jsonl\.xz"):
            list(read_runs(folder))
    for name in ("../../../x.json", "/etc/passwd/x.json", "a/../b.json", "a/b.json", "a/b/..", "a\\0/b/c.json"):
        forged(folder, json.dumps({"file": name, "run_info": {}, "train_info": {}, "metrics": {}}).encode(), 1)
        with pytest.raises(UserError, match="no file name"):
            unpack(folder)
    (folder / RUNS).write_bytes(whole)
    for text in ("[]", "{}", '{"format_version": 1}', "[" * 500):
        (folder / COMPARISON).write_text(text)
        with pytest.raises(UserError, match=r"comparison\.json"):
            list(read_runs(folder))
    (folder / COMPARISON).write_bytes(about)
    assert len(list(read_runs(folder))) == len(COLUMNS) * 4 and read_search(folder)["sst2"]


def test_a_result_that_says_odd_things_is_no_result(tmp_path: Path) -> None:
    content = json.loads(synthetic.result(COLUMNS[0], "rte", 0).to_bytes())
    path = tmp_path / "x.json"
    odd = {"seed": 10**70, "lr": "1e-3", "status": 3, "budget": None, "task": ["a"], "kind": {}, "configuration": []}
    for name, value in odd.items():
        path.write_text(json.dumps({**content, "run_info": {**content["run_info"], name: value}}))
        with pytest.raises(UserError, match="is no result of a comparison: its " + name):
            Result.load(path)


def test_a_metric_that_no_run_can_have_is_no_result(tmp_path: Path) -> None:
    """An accuracy of 7.5 was 750.0 of 100 in the report, and won."""
    content = json.loads(synthetic.result(COLUMNS[0], "rte", 0).to_bytes())
    path = tmp_path / "x.json"
    for name, value, sound in (
        ("accuracy", 7.5, False), ("accuracy", -0.1, False), ("macro_f1", 1.01, False), ("mcc", -1.01, False),
        ("exact_match", 10**60, False), ("accuracy", 1, True), ("f1", None, True), ("mcc", -1, True),
        ("mcc", 1 + 2**-52, True), ("loss", 7.5, True), ("objective", -7.5, True),
    ):  # fmt: skip
        path.write_text(json.dumps({**content, "metrics": {**content["metrics"], "test": {name: value}}}))
        if sound:
            assert Result.load(path).metrics["test"] == {name: value}
            continue
        with pytest.raises(
            UserError, match=f"is no result of a comparison: its {name} on 'test' is .*, not -?[01] to 1"
        ):
            Result.load(path)


def test_a_search_with_losses_that_no_run_has_is_refused(tmp_path: Path) -> None:
    """A picture whose axis is that long cannot be drawn."""
    search = {
        "lr": 1e-3,
        "losses": {"0.001": -1e308},
        "at_boundary": True,
        "seeds": [9],
        "runs": 1,
        "forwards": 40,
        "budget": 20,
    }
    (tmp_path / "search.json").write_text(json.dumps({"rte": {"mezo": search}}))
    with pytest.raises(UserError, match="-1e\\+308 is larger than a loss can be"):
        read_search(tmp_path)
