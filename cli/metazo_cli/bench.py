"""metazo bench"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metazo.io.terminal import print_json

from .messages import Terminal


def bench(
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="steps, kernels, memory, precision, meta, scaling, threads, queries, or one part as SUITE/PART; may be "
            "repeated. feedback, by itself: cosines of feedback estimates with the true gradient."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure small models and one shape, as a check.")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda for bfloat16 models of 134M, 1.3B and 8B.")] = "cpu",
    rounds: Annotated[
        int | None, typer.Option(help="Least number of rounds per median: 5 by default, and 2 with --quick.", min=5)
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for speed.json and speed.md, and for speed.png of steps and scaling.")
    ] = Path("runs/bench"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure the cost of a step beyond its forward passes on this machine: time, memory, kernels, scaling.

    All suites take about half an hour on 2 cores. Each part is written when it is done; figures of parts that were measured
    before stay in --out.
    """
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from metazo.bench import picture, render, suites
    from metazo.errors import UserError
    from metazo.io.files import write_whole
    from metazo.io.lock import FolderLock
    from metazo.runs.interrupt import Interrupted, ends_at_once

    _check(device)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder.")
    if suite == ["feedback"] and rounds is None:
        return _feedback(out, quick, as_json)
    if "feedback" in (suite or []):
        raise UserError(
            "--suite feedback is measured by itself, and in one round: leave other suites and --rounds out."
        )
    settings = suites.Settings(quick, device, rounds or (2 if quick else 5))
    chosen = suites.selected(suites.parts(settings), suite or [])
    console = Terminal(stderr=as_json)
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[case]}"),
    )
    done: list[suites.Part] = []
    with FolderLock(out):
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("bench", total=len(chosen), case="")
            measured = 0

            def start(part: suites.Part) -> None:
                nonlocal measured
                measured = 0
                progress.update(task, description=f"{part.suite}/{part.name}", completed=len(done), case="")
                done.append(part)

            def tick() -> None:
                nonlocal measured
                measured += 1
                progress.update(task, case=f"{measured} timings")

            try:
                with ends_at_once("in the middle of a part"):
                    result = suites.run(chosen, out, settings, start=start, tick=tick)
            except Interrupted as stopped:
                raise Interrupted(
                    f"{max(len(done) - 1, 0)} of {len(chosen)} parts are in {out}; name the rest with --suite.",
                    stopped.by,
                ) from None
        write_whole(out / "speed.md", (render.markdown(result) + "\n").encode())
        drawn = picture.plot(result, out / "speed.png")
    if as_json:
        print_json(result)
        return
    for each in render.tables(result):
        table = Table(*each.heads, title=each.title)
        for row in each.rows:
            table.add_row(*row)
        console.print(table)
    console.print(render.sentence(result))
    written = "speed.json, speed.md and speed.png" if drawn else "speed.json and speed.md"
    console.print(f"{written} are in {out}", soft_wrap=True)


def _feedback(out: Path, quick: bool, as_json: bool) -> None:
    from rich.table import Table

    from metazo.bench import along_training
    from metazo.io.lock import FolderLock
    from metazo.runs.interrupt import ends_at_once

    with FolderLock(out), ends_at_once("before all cosines were measured; start it again."):
        rows = along_training.run(out, quick=quick)
    if as_json:
        print_json(rows)
        return
    table = Table(
        "task",
        "step",
        "surrogate",
        "all blocks",
        "blocks, from the last one down",
        title="Cosine with the true gradient",
    )
    for row in along_training.table(rows):
        table.add_row(*row)
    console = Terminal()
    console.print(table)
    console.print(f"{along_training.JSON} and {along_training.PICTURE} are in {out}", soft_wrap=True)


def _check(device: str) -> None:
    import torch

    from metazo.errors import UserError

    if device != "cpu" and not device.startswith("cuda"):
        raise UserError(f"--device {device!r} is not measured: choose cpu or cuda.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no CUDA device here; leave the flag out to measure the CPU.")
