"""metazo demo"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from metazo.io.terminal import print_json

from .messages import Terminal


def demo(
    out: Annotated[Path, typer.Option(help="Folder for all output.")] = Path("runs/demo"),
    forwards: Annotated[int, typer.Option(help="Forward passes per fine-tuning run.", min=20)] = 1000,
    meta_steps: Annotated[int, typer.Option(help="Number of meta-steps for the tuner.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Meta-train a tuner for the embedded model, publish it, and fine-tune two other tasks with it and with MeZO."""
    from metazo.demo import clear, run_demo

    if overwrite:
        clear(out)
    started = time.monotonic()
    console = Terminal(stderr=as_json)
    result = run_demo(out, console, forwards=forwards, meta_steps=meta_steps, seed=seed)
    if as_json:
        print_json(result.runs)
        return
    table = Table(title=f"Fine-tuning pico: {forwards:,} forward passes each")
    for heading in ("task", "method", "before", "after", "accuracy", "majority"):
        table.add_column(heading, justify="left" if heading in ("task", "method") else "right", no_wrap=True)
    for task, methods in result.runs.items():
        for method, run in methods.items():
            figures = (run["before"]["loss"], run["dev"]["loss"], run["test"]["accuracy"], run["test"]["majority"])
            table.add_row(task, method, *(f"{figure:.3f}" for figure in figures))
        table.add_section()
    console.print(table)
    console.print(
        "Before and after: loss on dev. Accuracy and majority class: on test, whose words and templates were never trained "
        "on. One seed: a single run shows the workings, not a winner."
    )
    for what, path in result.written.items():
        console.print(f"{what}: {path}", soft_wrap=True)
    console.print(f"{time.monotonic() - started:.0f} s in all")
