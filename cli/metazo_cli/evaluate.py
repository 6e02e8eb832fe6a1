"""metazo evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from metazo.io.terminal import Console, print_json

from .messages import Terminal


def evaluate(
    run: Annotated[
        str | None,
        typer.Argument(help="Folder of a run, whose model is evaluated on its own rows.", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a model, or pico, instead of a run.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Name or YAML file of a task; may be repeated. The default is the run's task."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with <task>/<split>.jsonl; by default the Hub.")] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate: dev or test.")] = "test",
    examples: Annotated[
        int | None, typer.Option(help="Most examples; by default the run's, or 500 on dev and 1000 on test.", min=1)
    ] = None,
    train_examples: Annotated[
        int | None, typer.Option(help="Number of rows that count as training rows and are not scored.", min=0)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per batch (default 32).", min=1)] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest input in tokens.", min=1)] = None,
    kind: Annotated[
        str | None, typer.Option(help="auto, causal, masked, classifier or seq2seq (default auto).")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="Head of a classifier: prototype or phrases are made from the task, untrained.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 (default), bfloat16, float16 or float64; by default the run's.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1, or another of torch that has float64, unlike mps; by default a GPU if there is one."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the split (default 0); a tuned model has that of its training.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Evaluate a model on tasks: loss, metric, and the accuracy of always giving the commonest answer.

    metazo evaluate runs/a

    metazo evaluate --model pico --task pico_sentiment --task pico_topic
    """
    from metazo.errors import UserError
    from metazo.runs.locate import read_config, run_of
    from metazo.runs.measure import evaluate as score

    if (run is None) == (model is None):
        raise UserError("Name one model to evaluate: either the folder of a run, or a model with `model`.")
    notes = Terminal(stderr=True)
    results = {}
    of_run = run_of(Path(str(run or model)))
    for name in task or [None]:
        results[str(name or (of_run and read_config(of_run)["task"]))] = score(
            str(run or model),
            name,
            split=split,  # type: ignore[arg-type]
            examples=examples,
            say=lambda note: notes.say("note:", note),
            data=data,
            train_examples=train_examples,
            eval_batch_size=batch_size,
            max_length=max_length,
            kind=kind,
            head=head,
            dtype=dtype,
            device=device,
            seed=seed,
        )
    if as_json:
        print_json(results)
        return
    for result in results.values():
        if "accuracy" not in result:
            result.pop("majority", None)  # an accuracy, which beside another metric would be read as that
    names = list(dict.fromkeys(metric for result in results.values() for metric in result))
    table = Table("task", *names, title=f"{run or model}, {split}")
    for name, result in results.items():
        table.add_row(name, *(f"{result[metric]:.4g}" if metric in result else "" for metric in names))
    Console().print(table)
