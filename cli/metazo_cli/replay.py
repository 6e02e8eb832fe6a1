"""metazo replay"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from metazo.io.terminal import Console, print_json, print_line


def replay(
    log: Annotated[Path, typer.Argument(help="A step log, or the folder of a run.")],
    base: Annotated[str, typer.Option(help="Folder or Hub id of the base model, or pico.")],
    out: Annotated[Path, typer.Option(help="Folder for the tuned model.")],
    to: Annotated[
        int | None, typer.Option(help="Steps to take; by default up to the weights that the run kept.", min=0)
    ] = None,
    tuner: Annotated[str | None, typer.Option(help="Tuner of the run, if the zoo folders do not have it.")] = None,
    zoo_folder: Annotated[Path | None, typer.Option("--zoo", help="Zoo folder to search first.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Save LoRA adapters added to the weights, as a plain model.")
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda, cuda:1, or another of torch that has float64, unlike mps; auto takes a GPU if there is one."
        ),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Rebuild a tuned model from its base model and its step log: no data, no forward passes.

    metazo replay runs/a/steps.jsonl --base pico --out tuned
    """
    from metazo.models.embedded import ADAPTERS
    from metazo.runs.replay import replay as run

    with Progress(console=Console(), disable=as_json) as bar:
        task = bar.add_task("replay", total=None)
        done = run(
            log, base, out, to, tuner=tuner, zoo_folder=zoo_folder, merge=merge, device=device,
            tick=lambda step, total: bar.update(task, completed=step, total=total),
        )  # fmt: skip
    result = {
        "steps": done.steps,
        "seconds": round(done.seconds, 3),
        "weights": done.weights,
        "identical": done.identical,
        "differences": done.differences,
        "distance": done.distance,
        "notes": done.notes,
    }
    if as_json:
        print_json(result)
        return
    for note in done.notes:
        print_line(f"note: {note}")
    apart = done.distance
    distance = "how near they are is not known" if apart is None else f"the relative distance is {apart:.1e}"
    verdict = {
        True: "bit-identical to the weights that the run kept",
        False: "not bit-identical to the weights that the run kept, in another environment "
        f"({'; '.join(done.differences)}); {distance}",
        None: "the log does not record the hash of these weights",
    }[done.identical]
    what = "adapters, not merged into their base, are" if (out / ADAPTERS).is_file() else "model is"
    print_line(f"{done.steps:,} steps in {done.seconds:.1f} s; {verdict}; the {what} in {out}")
