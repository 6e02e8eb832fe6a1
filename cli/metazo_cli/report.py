"""metazo report"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


class Metric(StrEnum):
    loss = "loss"
    accuracy = "accuracy"


def report(
    results: Annotated[Path, typer.Argument(help="Folder that metazo compare wrote.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report; by default RESULTS/report.")] = None,
    metric: Annotated[
        Metric | None,
        typer.Option(
            help="What ranks the columns; by default accuracy where every task has it. accuracy: each task's metric."
        ),
    ] = None,
    render: Annotated[
        list[Path] | None,
        typer.Option(help="Markdown file whose blocks <!-- results:NAME --> are filled, and no report written."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write what a comparison found: one HTML page for everyone, Markdown, CSV and pictures.

    metazo report results/pico
    """
    from metazo.report.build import build
    from metazo.report.comparison import Comparison
    from metazo.report.write import render as fill
    from metazo.report.write import write

    made = build(Comparison(results), metric.value if metric else None)
    if render:
        written = [path for path in render if fill(made, path)]
        shown = "\n".join(f"{path}: {'filled anew' if path in written else 'as it was'}" for path in render)
    else:
        written = write(made, out or results / "report")
        shown = f"{made.story.won}\n{written[0]}"
    if as_json:
        print(json.dumps({"written": list(map(str, written)), "won": made.story.won}))
        return
    Console().print(shown, highlight=False, markup=False, soft_wrap=True)
