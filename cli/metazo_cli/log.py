"""`metazo log`: show, verify, compare and repair step logs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from metazo.errors import UserError
from metazo.io.plain import cut
from metazo.io.terminal import Console, print_json, print_line
from metazo.steplog.format import STEPS, Scan, scan

app = typer.Typer(help="Show, verify, compare and repair step logs.", no_args_is_help=True)

DRAWN = 1e30
MOST_SHOWN = 64  # numbers of a list; a step may have 131,072 losses
LogArgument = Annotated[Path, typer.Argument(help="A step log, or the folder of a run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _file(log: Path) -> Path:
    return log / STEPS if log.is_dir() else log


@app.command()
def show(
    log: LogArgument,
    last: Annotated[int, typer.Option(help="Number of last steps to list.", min=0)] = 5,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG file for a plot of loss and learning rate.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the header of a log, its steps, and the course of the loss."""
    from metazo.steplog.inspect import summary

    from . import options

    if plot is not None:
        options.check_plot(plot)
    found = scan(_file(log))
    if plot is not None:
        draw(plot, found)
    if as_json:
        print_json({"header": found.header, **summary(found), "damage": found.damage})
    else:
        tell(found, last, Console())


def tell(found: Scan, last: int, console: Console) -> None:
    """Show a log: its header, its figures, and the last steps."""
    from metazo.steplog.inspect import curve, minimised, sparkline, summary

    about = Table("header", "")
    for key, value in found.header.items():
        if isinstance(value, dict):
            value = ", ".join(
                f"{name} {item}" for name, item in cut(value).items() if item not in (None, [], {}, False)
            )
        about.add_row(key, str(value))
    console.print(about)
    table = Table("log", "")
    for key, value in summary(found).items():
        table.add_row(key, _shown(value))
    console.print(table)
    losses = [loss for _, loss in curve(found)]
    if losses:
        console.print(f"{minimised(found)} {losses[0]:.4g} {sparkline(losses)} {losses[-1]:.4g}")
    if last and found.steps:
        steps = Table("step", "losses", "c", "lr", title=f"the last {min(last, len(found.steps))} steps")
        for step in found.steps[-last:]:
            steps.add_row(str(step.step), _shown(step.losses), _shown(step.coefficients) or "skipped", _shown(step.lr))
        console.print(steps)
    if found.damage:
        console.say("damaged:", found.damage, "bold red")


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        rest = f", ... ({len(value):,} in all)" if len(value) > MOST_SHOWN else ""
        return ", ".join(map(_shown, value[:MOST_SHOWN])) + rest
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def draw(path: Path, found: Scan) -> None:
    """Loss and learning rate against the step. Numbers beyond DRAWN, and those that are not finite, are left out."""
    from metazo.plots.curves import plot_curves
    from metazo.steplog.inspect import curve, minimised

    what = minimised(found)
    panels = {
        f"{what} (mean over a step's probes)": {what: [point for point in curve(found) if abs(point[1]) < DRAWN]},
        "learning rate": {"lr": [(s.step, s.lr[0]) for s in found.steps if s.lr and abs(s.lr[0]) < DRAWN]},
    }
    panels = {name: lines for name, lines in panels.items() if any(lines.values())}
    if not panels:
        raise UserError(f"{found.path} holds no loss or learning rate that can be drawn; leave --plot out.")
    plot_curves(panels, path, x="step", y="", title=f"{found.header.get('task')}, {found.header.get('method')}")


@app.command()
def verify(log: LogArgument, as_json: JsonOption = False) -> None:
    """Check header, checksums, their chain and the order of the steps; the exit code is 1 if a check fails."""
    from metazo.steplog.inspect import verify as check

    path = _file(log)
    wrong, found = check(path), scan(path)
    steps = len(found.steps)
    if as_json:
        print_json({"steps": steps, "complete": found.end is not None, "wrong": wrong})
    else:
        end = "" if found.end else "; no last line: the run is not finished, or the end was cut off"
        print_line(f"{path}: {steps} whole steps, " + ("; ".join(wrong) or "in order") + end)
    if wrong:
        raise typer.Exit(1)


@app.command()
def diff(a: LogArgument, b: LogArgument, as_json: JsonOption = False) -> None:
    """Show the differences of two logs: headers, and the first step that differs; the exit code is 1 if there are any."""
    from metazo.steplog.inspect import diff as compare

    found = compare(scan(_file(a)).sound(), scan(_file(b)).sound())
    if as_json:
        print_json(found)
    else:
        tell_differences(found, a, b, Console())
    if not found["same"]:
        raise typer.Exit(1)


def tell_differences(found: dict[str, Any], a: Path, b: Path, console: Console) -> None:
    """Show what `metazo.steplog.inspect.diff` found in two logs."""
    if found["same"]:
        console.print(f"the same, {found['steps'][0]} steps")
        return
    table = Table("", "field", str(a), str(b))
    for row in map(cut, found["headers"]):
        table.add_row("header", row["field"], _shown(row["a"]), _shown(row["b"]))
    for row in (found["first"] or {"fields": []})["fields"]:
        table.add_row(f"step {found['first']['step']}", row["field"], _shown(row["a"]), _shown(row["b"]))
    console.print(table)
    first = f"the first different step is {found['first']['step']}" if found["first"] else "all steps are the same"
    console.print(f"{first}; {found['steps'][0]} and {found['steps'][1]} steps")


@app.command()
def repair(log: LogArgument) -> None:
    """Keep the intact lines of a damaged log and move the rest to a file.

    metazo finetune --resume computes the rest again, to the same bits.
    """
    from metazo.steplog.inspect import repair as run

    path = _file(log)
    if not path.is_file():
        raise UserError(f"{path} is no file.")
    steps, rest, aside = run(path)
    told = f"{rest} bytes behind them are now in {aside}" if aside else "nothing was wrong with it"
    print_line(f"{path} holds {steps} whole steps; {told}.")
