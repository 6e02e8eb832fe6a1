"""metazo evaluate"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .messages import Terminal


def evaluate(
    model: Annotated[str, typer.Option(help="Folder or Hub id of the model, or pico.")],
    task: Annotated[list[str], typer.Option(help="Task by name or YAML file; may be repeated.")],
    data: Annotated[Path | None, typer.Option(help="Folder with <task>/<split>.jsonl; by default the Hub.")] = None,
    split: Annotated[str, typer.Option(help="dev or test.")] = "test",
    examples: Annotated[int, typer.Option(help="Most examples.", min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(help="Examples a batch.", min=1)] = 32,
    max_length: Annotated[int | None, typer.Option(help="Longest input in tokens.", min=1)] = None,
    kind: Annotated[str, typer.Option(help="auto, causal, masked or classifier.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Evaluate a model on tasks: loss, metric, and what the majority class would score."""
    from metazo.errors import UserError
    from metazo.models.load import load_model
    from metazo.runs.method import resolve_device
    from metazo.tasks import prepare, resolve
    from metazo.tasks.evaluate import evaluate as run

    if split not in ("dev", "test"):
        raise UserError(f"--split {split!r}: choose dev or test.")
    results = {}
    for name in task:
        chosen = resolve(name)
        labels = len(chosen.labels) if chosen.kind == "classification" else None
        loaded = load_model(
            model,
            kind=kind,
            dtype=dtype,
            device=resolve_device(device),
            num_labels=labels,
            seed=seed,
            trained_head=True,
        )  # fmt: skip
        sizes = {"dev": examples, "test": 1000} if split == "dev" else {"dev": 500, "test": examples}
        prepared = prepare(chosen, loaded, data=data, seed=seed, max_length=max_length, **sizes)
        results[name] = run(loaded.model, prepared, split, batch_size=batch_size)  # type: ignore[arg-type]
        for note in prepared.notes:
            Terminal(stderr=True).print(f"note: {note}", highlight=False)
    if as_json:
        print(json.dumps(results))
        return
    names = list(dict.fromkeys(metric for result in results.values() for metric in result))
    table = Table("task", *names, title=f"{model}, {split}")
    for name, result in results.items():
        table.add_row(name, *(f"{result[metric]:.4g}" if metric in result else "" for metric in names))
    Console().print(table)
