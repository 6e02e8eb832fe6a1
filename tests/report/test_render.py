"""Blocks of a Markdown file are filled with tables; those of the project's own pages are up to date."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from metazo.comparisons.results import cell_path
from metazo.errors import UserError
from metazo.report.analysis import Analysis
from metazo.report.build import build
from metazo.report.comparison import FORWARD_ONLY, Comparison
from metazo.report.write import BLOCK, FIGURES, TABLES, blocks, fill, render, write
from metazo_cli import main
from metazo_cli.report import report as report_command
from tests.report import synthetic

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_blocks_are_filled_and_the_rest_is_left(tmp_path: Path):
    folder = synthetic.write(tmp_path / "mine", synthetic.COLUMNS[:3], ["sst2"], 2)
    report = build(Comparison(folder))
    page = tmp_path / "page.md"
    mine, other = "<!-- results:mine/loss -->\nstale", "<!-- results:other/loss -->\nkept"
    page.write_text(f"# A\n{mine}\n<!-- /results -->\nB\n{other}\n<!-- /results -->\n")
    assert render(report, page) == [page]
    after = page.read_text()
    loss = next(table for table in report.tables if table.name == "loss")
    assert f"<!-- results:mine/loss -->\n{loss.markdown()}\n<!-- /results -->\nB\n" in after
    assert "stale" not in after and "kept" in after and after.startswith("# A\n")
    assert render(report, page) == []  # no table is out of date now


def test_what_cannot_be_filled_is_said(tmp_path: Path):
    report = build(Comparison(synthetic.write(tmp_path / "mine", synthetic.COLUMNS[:1], ["sst2"], 1)))
    page = tmp_path / "page.md"
    with pytest.raises(UserError, match="cannot be read"):
        render(report, page)
    page.write_text("no blocks")
    with pytest.raises(UserError, match="no block"):
        render(report, page)
    page.write_text("<!-- results:mine/los -->\n<!-- /results -->")
    with pytest.raises(UserError, match="no table 'los'"):
        render(report, page)


def test_no_page_is_filled_if_another_cannot_be(tmp_path: Path):
    report = build(Comparison(synthetic.write(tmp_path / "mine", synthetic.COLUMNS[:1], ["sst2"], 1)))
    pages = [tmp_path / "first.md", tmp_path / "second.md"]
    pages[0].write_text("<!-- results:mine/loss -->\n<!-- /results -->")
    for text in ("no blocks", "<!-- results:mine/los -->\n<!-- /results -->"):
        pages[1].write_text(text)
        before = pages[0].read_text()
        with pytest.raises(UserError):
            render(report, *pages)
        assert pages[0].read_text() == before
    pages[1].write_text(pages[0].read_text())
    assert render(report, *pages, pages[0]) == pages
    assert all("| column |" in page.read_text() for page in pages)


@pytest.mark.parametrize(
    ("flags", "without"),
    [(["--pack", *more], more[0]) for more in (["--out", "new"], ["--metric", "loss"], ["--render", "page.md"])]
    + [(["--render", "page.md", "--out", "new"], "--out")],
)
def test_flags_without_effect_are_refused(
    flags: list[str], without: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """They were ignored."""
    monkeypatch.chdir(tmp_path)
    synthetic.write(tmp_path / "mine", synthetic.COLUMNS[:1], ["sst2"], 1)
    (tmp_path / "page.md").write_text("<!-- results:mine/loss -->\n<!-- /results -->")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", ["metazo", "report", "mine", *flags])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2 and f"so {without} has no effect; " in " ".join(capfd.readouterr().err.split())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_command_line(tmp_path: Path):
    app = typer.Typer()
    app.command()(report_command)
    folder = synthetic.write(tmp_path / "mine", synthetic.COLUMNS[:3], ["sst2"], 2)
    done = CliRunner().invoke(app, [str(folder), "--metric", "loss", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert "an average loss of" in told["won"] and Path(told["written"][0]) == folder / "report" / "report.html"
    assert all(Path(path).is_file() for path in told["written"])
    page = tmp_path / "page.md"
    page.write_text("<!-- results:mine/tests-loss -->\n<!-- /results -->\n<!-- results:story -->\n<!-- /results -->\n")
    done = CliRunner().invoke(app, [str(folder), "--render", str(page)])
    assert done.exit_code == 0 and "filled anew" in done.output and "| mezo-rms | 2 |" in page.read_text()
    assert "-->\ntuner came first: " in page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_the_pages_are_not_stale(page: Path):
    """metazo report results/NAME --render PAGE brings them up to date."""
    text = page.read_text()
    folders = {found["name"].rpartition("/")[0] for found in BLOCK.finditer(text)}
    if not folders:
        pytest.skip(f"{page.name} has no blocks of results")
    for name in sorted(folders):
        report = build(Comparison(ROOT / "results" / name))
        assert fill(text, blocks(report), name) == text, name


def test_the_cost_of_searches_and_the_lower_losses_in_the_text_are_those_of_the_runs():
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    shares = {}
    for name in ("pico", "minilm-head", "minilm", "stories", "real"):
        data = Comparison(ROOT / "results" / name)
        runs = sum(run.forwards for runs in data.runs.values() for run in runs.values())
        shares[name] = f"{sum(s.forwards for found in data.searches.values() for s in found.values()) / runs:.2g}"
    assert (
        f"took {shares['pico']} times the forward passes of the reported runs for pico, {shares['minilm-head']} and "
        f"{shares['minilm']} for all-MiniLM-L6-v2 (head, prototypes) and {shares['stories']} for stories3m; "
        f"{shares['real']} for the real tasks." in page
    )
    names = {"mezo-rms": "the RMS scale", "tuner": "the tuner", "curvzo": "CurvZO", "loren": "LOREN"}
    pico = Analysis(Comparison(ROOT / "results" / "pico"), "loss")
    means = {column: value.mean for column, value in pico.ranking if pico.data.family(column) in FORWARD_ONLY}
    lower = [column for column in means if means[column] < means["mezo"]]
    said = re.search(r"beyond luck\.\*\* ([^;]*) have a lower mean loss", page)
    assert said is not None
    told = re.sub("lower loss in | of 10 pairs", "", said[1]).replace(" and ", ", ").split(", ")
    assert sorted(told) == sorted(f"{names.get(c, c.upper())} ({pico.tests[c].wins})" for c in lower)
    assert min(pico.tests[c].holm or 0 for c in lower) > 0.15


def test_what_two_seeds_of_the_real_tasks_would_have_said():
    page, data = " ".join((ROOT / "docs" / "results.md").read_text().split()), Comparison(ROOT / "results" / "real")
    data.runs = {cell: {seed: run for seed, run in runs.items() if seed < 2} for cell, runs in data.runs.items()}
    tests = Analysis(data, "loss", needs_reference=False).tests
    assert {tests[c].pairs for c in ("meazo", "fzoo")} == {12}
    first, second = (f"{tests[c].holm:.2g}" for c in ("meazo", "fzoo"))
    told = f"MEAZO seems better beyond luck (p = {first} after Holm over {len(tests)} columns) and FZOO does not (p = {second})"
    assert told in page


def test_files_of_an_earlier_report_are_removed_and_others_are_left(tmp_path: Path):
    columns = [column for column in synthetic.COLUMNS if column.name in ("mezo", "lozo")]
    folder, out = synthetic.write(tmp_path / "mine", columns, ["sst2"], 2), tmp_path / "out"
    mine = out / "tables" / "search.csv"
    mine.parent.mkdir(parents=True)
    mine.write_text("of another program")
    (folder / "search.json").rename(tmp_path / "search.json")
    write(build(Comparison(folder)), out)
    assert mine.read_text() == "of another program"  # no report was there before
    (tmp_path / "search.json").rename(folder / "search.json")
    cell_path(folder, "sst2", "lozo", "seed", 0).unlink()
    first = set(write(build(Comparison(folder)), out))
    known = {f"{name}.csv" for name in TABLES} | {f"{name}.svg" for name in FIGURES}
    assert {path.name for path in first if path.parent != out} <= known
    kept = [out / "tables" / "mine.csv", out / "figures" / "mine.svg", out / "search.csv"]
    for path in kept:
        path.write_text("mine")
    (folder / "search.json").unlink()
    shutil.rmtree(folder / "cells" / "sst2" / "lozo")
    grid = yaml.safe_load((folder / "grid.yaml").read_text())
    grid["columns"] = [column for column in grid["columns"] if column["name"] != "lozo"]
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    second = set(write(build(Comparison(folder)), out))
    gone = {path.name for path in first - second}
    assert {"search.csv", "by-rate.csv", "missing.csv", "sensitivity.svg"} <= gone
    assert {path for path in out.rglob("*") if path.is_file()} == second | set(kept)


def test_every_table_and_picture_has_a_name_that_a_later_report_removes():
    source = "".join(path.read_text() for path in (ROOT / "metazo" / "report").glob("*.py"))
    names = set(re.findall(r"(?:Table|Picture)\(\s*\"([\w-]+)\"", source))
    assert len(names) > 15 and names <= {*TABLES, *FIGURES}
