"""Writes a report to disk (one HTML page, Markdown, CSV, pictures), and fills blocks of other files with its tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.files import write_whole
from metazo.plots.style import data_uri

from .build import SIGMA_PICTURES, Report
from .comparison import Comparison
from .table import Table, escape_markdown, write_csv

with needs("report"):
    from jinja2 import Environment, FileSystemLoader

FIGURES = ("headline", "curves-forwards", "curves-seconds", "plane", "pareto", "sensitivity",
           *(f"sigma-{number + 1}" for number in range(SIGMA_PICTURES)))  # fmt: skip
TABLES = ("summary", "loss", "metric", "tests-loss", "tests-metric", "tests-best", "reach", "time", "rivals", "pairs", "cost",
          "cells", "search", "by-rate", "tasks", "failures", "missing", "configuration")  # fmt: skip
BLOCK = re.compile(r"(<!-- results:(?P<name>[\w./-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def write(report: Report, out: Path) -> list[Path]:
    """Write report.html, report.md, figures/*.svg, tables/*.csv, runs.csv and curves.csv. Returns the written paths.

    Figures and tables that an earlier report wrote there, and this one has not, are removed.
    """
    content = {"report.html": html(report), "report.md": markdown(report)}
    content |= {f"figures/{picture.name}.svg": picture.svg for picture in report.pictures}
    content |= {f"tables/{table.name}.csv": table.csv() for table in report.tables}
    content |= {"runs.csv": runs_csv(report.data), "curves.csv": curves_csv(report.data)}
    if out.exists() and not out.is_dir():
        raise UserError(f"`out` {out} is a file; name a folder.")
    if (out / "report.html").is_file() and (out / "report.md").is_file():
        known = {*(f"figures/{name}.svg" for name in FIGURES), *(f"tables/{name}.csv" for name in TABLES)}
        for stale in (out / name for name in known - content.keys()):
            if stale.is_file():
                stale.unlink()
    for name, text in content.items():
        write_whole(out / name, text.encode(errors="replace"))
    return [out / name for name in content]


def command(report: Report) -> str:
    """The commands that reproduce the results and this report."""
    folder = report.data.folder
    folder = shlex.quote(folder.name if folder.is_absolute() else folder.as_posix())
    return f"metazo compare {folder}/grid.yaml --out {folder}-again\nmetazo report {folder}-again"


def html(report: Report) -> str:
    """One self-contained HTML page. All text of the results is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    uris = {picture.name: data_uri(picture.svg) for picture in report.pictures}
    return environment.get_template("page.html").render(
        story=report.story, headline=report.headline, sections=report.sections, uris=uris, command=command(report),
    )  # fmt: skip


def markdown(report: Report) -> str:
    """The report as Markdown, with its pictures in a folder beside it."""
    told = report.story
    lines = [
        f"# {escape_markdown(told.title)}",
        f"**{escape_markdown(told.won)}**",
        f"Compared: {escape_markdown(told.compared)}",
    ]
    lines += [_image(report.headline)] if report.headline else []
    lines += [f"**{heading}** {escape_markdown(text)}" for heading, text in told.facts]
    lines += [f"- *{escape_markdown(term)}*: {escape_markdown(text)}" for term, text in told.terms]
    for section in report.sections:
        lines += [f"## {section.title}", *([section.text] if section.text else [])]
        for part in section.parts:
            if isinstance(part, Table):
                lines += [f"### {escape_markdown(part.title)}", escape_markdown(part.note), part.markdown()]
            else:
                lines += [_image(part)]
    lines += ["### To reproduce", f"```bash\n{command(report)}\n```"]
    return "\n\n".join(lines) + "\n"


def _image(picture: Any) -> str:
    caption = f"*{escape_markdown(picture.title)}.* {escape_markdown(picture.caption)}"
    return f"![{escape_markdown(picture.alt)}](figures/{picture.name}.svg)\n\n{caption}"


def runs_csv(data: Comparison) -> str:
    """One row per run, with full precision."""
    heads = ["task", "column", "kind", "seed", "status", "lr", "split", "loss", "metric", "metric_name", "majority",
             "loss_before", "forwards", "seconds", "wall_seconds", "peak_memory_bytes", "trained_weights",
             "reason"]  # fmt: skip
    rows: list[list[Any]] = []
    for kind, runs in (("seed", data.runs), ("time", data.timed)):
        for (task, column), seeds in sorted(runs.items()):
            for run in (seeds[seed] for seed in sorted(seeds)):
                info = run.info
                rows.append([task, column, kind, run.seed, "finished", info.get("lr"), run.split, run.loss, run.metric,
                             info.get("metric"), run.majority, run.before, run.forwards, run.seconds, run.wall, run.memory,
                             run.trained, ""])  # fmt: skip
    for f in data.failures:
        rows.append([f.task, f.column, f.kind, f.seed, f.status, *[None] * 12, f.reason])
    return write_csv([heads, *rows])


def curves_csv(data: Comparison) -> str:
    """One row per evaluation on dev."""
    rows: list[list[Any]] = [["task", "column", "kind", "seed", "forwards", "seconds", "loss", "metric"]]
    for kind, runs in (("seed", data.runs), ("time", data.timed)):
        for (task, column), seeds in sorted(runs.items()):
            for run in (seeds[seed] for seed in sorted(seeds)):
                rows += [[task, column, kind, run.seed, p.forwards, p.seconds, p.loss, p.metric] for p in run.curve]
    return write_csv(rows)


def blocks(report: Report) -> dict[str, str]:
    """The contents for blocks of a page: each table by its name, and `story`, the text of the first screen."""
    told = report.story
    facts = [f"{heading} {text}" if heading.endswith("?") else f"{heading}: {text}" for heading, text in told.facts]
    lines = [escape_markdown(text) for text in (told.won, f"Compared: {told.compared}", *facts)]
    return {"story": "\n\n".join(lines)} | {table.name: table.markdown() for table in report.tables}


def fill(text: str, blocks: Mapping[str, str], folder: str) -> str:
    """`text` with its <!-- results:FOLDER/NAME --> ... <!-- /results --> filled with blocks[NAME].

    Blocks of other folders stay as they are. Raises UserError for a name that is not in `blocks`.
    """

    def replaced(found: re.Match[str]) -> str:
        owner, _, name = found["name"].rpartition("/")
        if owner not in ("", folder):
            return found[0]
        if name not in blocks:
            raise UserError(f"There is no table {name!r} to fill a block with; there are {', '.join(sorted(blocks))}.")
        return f"{found[1]}{blocks[name]}\n{found[3]}"

    return BLOCK.sub(replaced, text)


def render(report: Report, *paths: Path) -> list[Path]:
    """Fill the blocks of Markdown files. Returns those that changed.

    Raises UserError if one cannot be read or has no block to fill, or one that cannot be filled, before any is written.
    """
    content, folder = blocks(report), report.data.folder.resolve().name
    changed: dict[Path, str] = {}
    for path in paths:
        try:
            before = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"`render` {path} cannot be read: {error}.") from error
        if not BLOCK.search(before):
            raise UserError(f"`render` {path} has no block <!-- results:NAME --> ... <!-- /results --> to fill.")
        if (after := fill(before, content, folder)) != before:
            changed[path] = after
    for path, after in changed.items():
        write_whole(path, after.encode())
    return [*changed]
