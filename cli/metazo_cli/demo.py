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
    model: Annotated[str, typer.Option(help="MiniLM, pico, or auto: MiniLM if it is on this machine.")] = "auto",
    forwards: Annotated[int, typer.Option(help="Forward passes per fine-tuning run.", min=6)] = 300,
    texts: Annotated[int, typer.Option(help="Passages without labels that feedback is fitted on.", min=64)] = 160,
    examples: Annotated[int, typer.Option(help="Examples of dev and of test each.", min=4)] = 120,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fit feedback from text, publish it, and fine-tune on a real task with forward passes and with gradients.

    The same command continues a demo that was interrupted.
    """
    from metazo.demo import run_demo

    started = time.monotonic()
    console = Terminal(stderr=as_json)
    settings = {"forwards": forwards, "texts": texts, "seed": seed, "examples": examples}
    result = run_demo(out, console, model=model, overwrite=overwrite, **settings)
    if as_json:
        print_json({"model": result.model, "runs": result.runs})
        return
    table = Table(title=f"Fine-tuning {result.model} on books: {forwards:,} forward passes each")
    for heading in ("method", "before", "after", "accuracy", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for method, run in result.runs.items():
        figures = (run["before"]["loss"], run["dev"]["loss"], run["test"]["accuracy"])
        table.add_row(method, *(f"{figure:.3f}" for figure in figures), f"{run['seconds']:.0f}")
    console.print(table)
    console.print(
        "Before and after: loss on dev; accuracy: on test. The four kinds of books are equally frequent. One seed: a single "
        "run shows the workings, and differences as large as those between probes and gradients, not a winner among equals."
    )
    for what, path in result.written.items():
        console.print(f"{what}: {path}", soft_wrap=True)
    console.print(f"{time.monotonic() - started:.0f} s in all")
