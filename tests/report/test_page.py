"""The page needs no other file, text is never executed, the same input gives the same bytes, and browsers show it."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metazo.comparisons.results import Result, cell_path
from metazo.report.build import Report, build
from metazo.report.comparison import Comparison
from metazo.report.table import write_csv
from metazo.report.write import html, markdown, runs_csv, write
from tests.report import synthetic

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return build(Comparison(folder))


class Tags(HTMLParser):
    """Every start tag with its attributes; checks that every tag is closed."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_self_contained_and_semantic(report: Report):
    page = html(report)
    tags = Tags(page)
    assert not {tag for tag, _ in tags.found} & {"script", "link", "iframe", "object", "form"}
    for image in tags.all("img"):
        assert image["src"].startswith("data:image/svg+xml;base64,") and len(image["alt"]) > 20
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page) and "url(" not in page and "@import" not in page
    assert len(tags.all("h1")) == len(tags.all("main")) == 1
    assert len(tags.all("caption")) == len(tags.all("table")) == len(report.tables)
    assert all(cell.get("scope") in ("col", "row") for cell in tags.all("th"))
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_report_has_all_of_it(report: Report):
    assert {"summary", "loss", "metric", "tests-loss", "tests-metric", "reach", "time", "cost", "search", "tasks",
            "configuration"} <= {table.name for table in report.tables}  # fmt: skip
    assert {"headline", "curves-forwards", "curves-seconds", "pareto", "sensitivity", "sigma-1"} <= {
        picture.name for picture in report.pictures
    }
    for picture in report.pictures:  # a unit or a scale on the axes of each
        assert re.search(r"nats|%|σ / mean σ", picture.svg), picture.name
    assert "tuner came first: 80" in report.story.won and "against 73.8 for mezo" in report.story.won


def test_same_input_same_bytes(tmp_path: Path):
    folder = synthetic.write(tmp_path / "results", synthetic.COLUMNS[::3], ["sst2", "cb"], 2)
    first, second = (write(build(Comparison(folder)), tmp_path / name) for name in ("a", "b"))
    assert len(first) == len(second) > 15
    for one, other in zip(first, second):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_names_and_reasons_are_text_wherever_they_stand(tmp_path: Path):
    """A results folder may come from a stranger: no text in it may become markup, a spreadsheet formula or mathematics."""
    evil = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>$\\frac{1}{0}$|`*_{{ 7*7 }}"""
    column = replace(synthetic.COLUMNS[2], name="=cmd()<b>")
    for seed in range(2):
        for each in (synthetic.COLUMNS[0], column):
            result = synthetic.result(each, evil, seed, label=evil)
            result.run_info["configuration"][evil] = evil
            result.run_info["versions"] = {evil: evil}
            result.save(cell_path(tmp_path, "task", each.name.replace("=cmd()<b>", "evil"), "seed", seed))
    synthetic.result(column, evil, 7, status="failed", reason=evil).save(cell_path(tmp_path, "task", "evil", "seed", 7))
    report = build(Comparison(tmp_path))
    page = html(report)
    tags = Tags(page)
    assert (
        not tags.all("script")
        and not tags.all("b")
        and not any("onerror" in attributes for _, attributes in tags.found)
    )
    assert (
        "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        and "{{ 7*7 }}" in page
        and "49" not in re.sub(r"data:\S+", "", page)
    )
    assert not any("<script" in picture.svg or "<b>" in picture.svg for picture in report.pictures)
    text = markdown(report)
    assert "<script" not in text and "<img" not in text
    for table in report.tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.markdown().splitlines()}
        assert widths == {len(table.headings) + 1}, table.name
    cells = [cell for row in csv.reader(runs_csv(report.data).splitlines()) for cell in row]
    assert "'=cmd()<b>" in cells and not any(cell.startswith(("=", "@", "+")) for cell in cells)


def test_formulas_are_marked_in_csv_and_numbers_are_not() -> None:
    formulas = [
        "=1+1|cmd",
        "-2+3+cmd|' /C calc'!A0",
        "+1-1",
        "@SUM(1)",
        "\t=1",
        "-1-1",
        "-.5+x",
        "-2.1 to =1",
        "-1 (dev)=",
    ]
    figures = ["-0.5", "-2.1 to 0.3", "-1.2 ± 0.3 (4 of 5)", "+3", "-1e-05", "-1,234", "-0.2 (dev)", "-inf", "a=b"]
    cells = [row[0] for row in csv.reader(write_csv([[text] for text in formulas + figures]).splitlines())]
    assert cells == [f"'{text}" for text in formulas] + figures


def test_runs_csv_holds_what_was_measured(report: Report, folder: Path):
    rows = list(csv.DictReader(runs_csv(report.data).splitlines()))
    assert len(rows) == 3 * 10 * 5 + 3 * 5
    row = next(r for r in rows if (r["task"], r["column"], r["kind"], r["seed"]) == ("rte", "lozo", "seed", "3"))
    assert float(row["loss"]) == Result.load(cell_path(folder, "rte", "lozo", "seed", 3)).metrics["test"]["loss"]


def browse(page: Path, out: Path, *flags: str) -> str:
    """Standard output of a headless browser on a page, in a profile of its own."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser among {', '.join(BROWSERS)} on this machine")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={out / 'profile'}",
        "--no-first-run",
    ]
    return subprocess.run([*command, *flags, page.as_uri()], capture_output=True, text=True, timeout=120).stdout


def test_a_browser_shows_it(report: Report, tmp_path: Path):
    write(report, tmp_path / "report")
    page, shot, print_out = tmp_path / "report" / "report.html", tmp_path / "shot.png", tmp_path / "page.pdf"
    dump = browse(page, tmp_path, "--dump-dom", "--window-size=1280,900", f"--screenshot={shot}")
    if not shot.exists():  # older browsers do one thing at a time
        browse(page, tmp_path, "--window-size=1280,900", f"--screenshot={shot}")
    dump = dump or browse(page, tmp_path, "--dump-dom")
    assert f"<title>{report.story.title}</title>" in dump and report.story.won in dump
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (900, 1280, 3)
    ink = (pixels.sum(axis=2) < 600).mean()
    assert 0.01 < ink < 0.4, "neither blank nor black"
    blue = (np.abs(pixels - (0x00, 0x72, 0xB2)).sum(axis=2) < 30).sum()
    assert blue > 100, "the picture's dots are on the first screen"
    browse(page, tmp_path, f"--print-to-pdf={print_out}", "--no-pdf-header-footer")
    assert print_out.read_bytes().startswith(b"%PDF") and print_out.stat().st_size > 20_000
