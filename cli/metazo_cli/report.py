"""metazo report"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from metazo.errors import UserError
from metazo.io.terminal import print_json, print_line


class Metric(StrEnum):
    loss = "loss"
    accuracy = "accuracy"


def report(
    results: Annotated[Path, typer.Argument(help="Folder of the results of metazo compare.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report; by default RESULTS/report.")] = None,
    metric: Annotated[
        Metric | None,
        typer.Option(
            help="Measure that ranks the columns; by default accuracy if every task has it. accuracy: each task's metric."
        ),
    ] = None,
    render: Annotated[
        list[Path] | None,
        typer.Option(help="Markdown file whose blocks <!-- results:NAME --> are filled; no report is written."),
    ] = None,
    pack: Annotated[
        bool,
        typer.Option("--pack", help="Pack the results of all runs into one compressed file; no report is written."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the written paths as JSON.")] = False,
) -> None:
    """Write the report of a comparison: one HTML page, Markdown, CSV and pictures.

    metazo report results/pico
    """
    without = [name for name, value in (("--out", out), ("--metric", metric), ("--render", render)) if value]
    if pack and without:
        raise UserError(f"--pack writes no report, so {without[0]} has no effect; leave one of them out.")
    if render and out:
        raise UserError(
            "--render fills the given files and writes no report, so --out has no effect; leave one of them out."
        )
    from metazo.comparisons.packed import pack as pack_runs
    from metazo.report.build import build
    from metazo.report.comparison import Comparison
    from metazo.report.write import render as fill
    from metazo.report.write import write

    if pack:
        before, after = pack_runs(results)
        if as_json:
            print_json({"bytes before": before, "bytes after": after})
        else:
            print_line(f"{results} is packed: {before:,} bytes before, {after:,} now")
        return
    made = build(Comparison(results), metric.value if metric else None)
    if render:
        written = fill(made, *render)
        shown = "\n".join(f"{path}: {'filled anew' if path in written else 'as it was'}" for path in render)
    else:
        written = write(made, out or results / "report")
        shown = f"{made.story.won}\n{written[0]}"
    if as_json:
        print_json({"written": list(map(str, written)), "won": made.story.won})
        return
    print_line(shown)
