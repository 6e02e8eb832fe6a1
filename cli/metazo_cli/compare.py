"""metazo compare"""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from rich.table import Table

from metazo.comparisons.columns import names
from metazo.comparisons.grid import Grid, pairs_of
from metazo.io.terminal import Console, print_json

from . import options
from .messages import Terminal, in_flags


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def compare(
    grid: Annotated[
        Path | None, typer.Argument(help="Grid as YAML, or a grid of metazo recipes; flags override it.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Names or YAML files of tasks, separated by commas. (required)")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--optimizers", help=f"Columns, separated by commas: {', '.join(names())}. (required)")
    ] = None,
    lrs: Annotated[
        str | None, typer.Option(help="Learning rates from which every search starts, separated by commas.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Repeat failed runs.")] = False,
    part: Annotated[
        str | None, typer.Option(help="INDEX/COUNT, such as 0/16: a part of the grid, for job arrays (docs/scale.md).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show runs, time and disk, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **values: Any,
) -> None:
    """Compare methods fairly: a learning-rate search for each, then seeds, at equal forward passes and equal time.

    metazo compare --model pico --tasks pico_sentiment --optimizers mezo,mezo-rms,lozo --budget 1000 --out runs/compare

    Call it again to continue after a stop, or to add seeds, tasks or columns: finished runs are not repeated.
    """
    from metazo.comparisons.compare import compare as run
    from metazo.comparisons.examine import examine, plan

    flags = {**values, "tasks": _listed(tasks), "columns": _listed(columns), "lrs": _listed(lrs)}
    settings = options.settings(Grid, grid, flags)
    if dry_run:
        pairs_of(settings, part)  # a part that does not exist is refused before models are loaded
        _show_plan(plan(settings, examine(settings), part), as_json)
        return
    console = Terminal(stderr=as_json)
    count = run(settings, console, retry_failed=retry_failed, part=part)
    if as_json:
        print_json(count)
        raise typer.Exit(1 if count["unsettled"] else 0)
    kept = f", {count['kept']} of them finished before" if count["kept"] else ""
    failed = (
        f"; {count['failed']} failed (their files say why; --retry-failed runs them again)" if count["failed"] else ""
    )
    if count["diverged"]:
        failed += f"; {count['diverged']} diverged"
    if count["not_run"]:
        failed += f"; {count['not_run']} not run: no learning rate of the search gave a finite loss"
    if count["unsettled"]:
        incomplete = f"{count['unsettled']} incomplete search{'es' * (count['unsettled'] > 1)}, because runs failed"
        then = "put right what their reasons say; the same command tries again"
        console.print(f"{count['runs']} runs{kept}{failed}. Not finished: {incomplete}. Now: {then}", soft_wrap=True)
        raise typer.Exit(1)
    then = (
        f"metazo report {quote(str(settings.out))}"
        if part is None
        else "the same command without --part, after all parts"
    )
    console.print(f"{count['runs']} runs{kept}{failed}. Now: {then}", soft_wrap=True)


def _show_plan(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    table = Table("plan", "", title="Nothing is run or written")
    for name, value in found.items():
        if name == "learning rates":
            value = "\n".join(f"{cell}: {' '.join(f'{lr:g}' for lr in rates)}" for cell, rates in value.items())
        if name not in ("seconds", "bytes on disk"):
            table.add_row(name, in_flags(str(value)))
    table.add_row("disk", f"about {found['bytes on disk'] / 1e6:.1f} MB")
    Console().print(table)


_flags = options.flags(Grid, skip=("tasks", "columns", "lrs", "config"))
command = options.with_flags(compare, _flags)
